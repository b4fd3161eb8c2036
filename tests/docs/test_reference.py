"""The reference is written from the code, and the pictures from their simulations."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from jobs.docs import figures, reference
from jobs.docs.job_files import field_rows
from jobs.docs.markdown import cell, escaped, sentence
from raydetect.cli.main import main
from raydetect.config.jobs import KINDS
from raydetect.detectors._registry import list_models


def test_the_stored_reference_is_that_of_the_code() -> None:
    for name, text in reference.pages().items():
        assert (reference.FOLDER / name).read_text() == text, f"{name} is old: run `make docs`"


def test_the_reference_has_everything() -> None:
    pages = reference.pages()
    for name in main.commands:
        assert f"\n## raydetect {name}\n" in pages["commands.md"]
    for name in KINDS:
        assert f"\n## kind: {name}\n" in pages["job-files.md"]
    for name in list_models():
        assert f"\n## {name}\n" in pages["detectors.md"]
    for method in ("fit", "detector", "predict", "p_values", "predict_anomaly_map", "save", "to_frame"):
        assert f"\n### {method}\n" in pages["python.md"]
    assert "| `alpha` | number > 0 and < 1 | none |" in pages["job-files.md"]
    assert "`--retry" in pages["commands.md"] and "Did you mean" in pages["python.md"]


def test_types_are_those_of_someone_who_writes_yaml() -> None:
    @dataclass(frozen=True)
    class Inner:
        """What is inside."""

    @dataclass(frozen=True)
    class Spec:
        """A job."""

        inner: Inner
        size: Annotated[tuple[int, int] | None, Field(description="(height, width)")] = None
        names: tuple[str, ...] = ("a",)
        share: Annotated[float, Field(gt=0, le=1, description="of a | b")] = 0.5
        how: Literal["x", "y"] = "x"
        more: Annotated[Mapping[str, tuple[int, ...]] | bool, Field(description="none: nothing")] = True

    Spec.__annotations__["inner"] = Inner
    assert field_rows(Spec, {Inner: "inner"}) == [
        ("`inner`", "[inner](#inner)", "", "What is inside."),
        ("`size`", "list of 2 integers", "none", "(height, width)."),
        ("`names`", "list of text", '`["a"]`', ""),
        ("`share`", "number > 0 and <= 1", "`0.5`", "Of a | b."),
        ("`how`", "`x`, `y`", '`"x"`', ""),
        ("`more`", "mapping of names to list of integers or `true` or `false`", "`true`", "none: nothing."),
    ]


def test_markdown_keeps_the_text() -> None:
    assert escaped("{name} and <name> and `{x}`, a*b") == "`{name}` and `<name>` and `{x}`, a\\*b"
    assert cell("a | b\n  c") == "a \\| b c"
    assert [sentence(text) for text in ("one", "full: x", "", "Two.")] == ["One.", "full: x.", "", "Two."]


def test_pictures_are_those_of_the_simulations(tmp_path: Path) -> None:
    figures.write(tmp_path)
    for name in figures.FIGURES:
        drawn, stored = tmp_path / f"{name}.svg", figures.FOLDER / f"{name}.svg"
        assert drawn.read_text() == stored.read_text(), f"{name}.svg is old: run `python -m jobs.docs.figures`"


def test_what_the_explanation_says_of_its_pictures() -> None:
    levels = (figures.FOLDER / "levels.md").read_text()
    for count, said in ((99, "0.1 and 2.9 %"), (999, "0.5 and 1.6 %")):
        low, high = np.percentile(100 * figures.rates_of_draws(count, 0.01), (5, 95))
        assert said == f"{np.floor(low * 10 + 0.5) / 10:.1f} and {high:.1f} %" and said in levels, (low, high)
    rates = figures.rates_of_draws(figures.NUM_CALIBRATION, 0.05)
    assert abs(rates.mean() - 0.05) < 0.001 and "5 % is 5 % on average" in (figures.FOLDER / "p-values.md").read_text()
    values_N, is_anomalous_N, found = figures.archive()
    by_alpha, by_fdr = values_N <= figures.ALPHA, values_N <= (found.p_threshold or 0.0)
    said = (
        f"alpha = 0.01 flags {by_alpha.sum()} images, {(by_alpha & ~is_anomalous_N).sum()} of them normal; "
        f"fdr = 0.05 flags {by_fdr.sum()}"
    )
    assert said in (figures.FOLDER / "false-discoveries.md").read_text(), said
    assert (by_fdr & ~is_anomalous_N).sum() == 2
