"""Code blocks are found in pairs of fences."""

from tests.builders.documents import blocks


def test_the_end_of_a_block_is_not_the_start_of_another() -> None:
    text = "```yaml\nkind: fit\n```\n\nwords\n\n```\nraydetect check fit.yaml\n```\n\n```text\nx\n```\n"
    assert blocks(text) == ["raydetect check fit.yaml\n"]
    assert blocks(text, "yaml") == ["kind: fit\n"] and blocks(text, "text") == ["x\n"]
