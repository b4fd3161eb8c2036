"""Secrets: a canary in every possible place of a job file appears in no message, log or file."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from ray.data._internal.metadata_exporter import sanitize_for_struct

from raydetect.cli.main import main
from raydetect.config import ServeSpec, StorageOptions, WebhookSpec, parse_job, public_spec
from raydetect.config.validation import parse_yaml
from raydetect.distributed import submit
from raydetect.errors import RaydetectError, SpecError
from raydetect.gateway.http.tokens import read_tokens
from raydetect.redaction import redacted
from raydetect.storage import Storage, normalise_uri, translate
from tests.builders.archives import mixed_files, normal_files, pack
from tests.config.test_job_text import JOBS

CANARY = "CANARYwJalrXUtnFEMIbPxRfiCYEXAMPLEKEY"
BASE64 = "CANARY/K7MDENG+bPxRfi/CYEXAMPLE"  # AWS keys contain slashes
STORAGES = [
    "CANARY",
    "[CANARY]",
    "[[{secret: CANARY}]]",
    "'key=a,secret=CANARY'",
    "{CANARY: 1}",
    "{key:CANARY, secret:CANARY}",
    '{"key":"CANARY" "secret":"CANARY"}',
    "{secret: [CANARY]}",
    "{secret: {CANARY: CANARY}}",
    "{secret: CANARY, secret: CANARY}",
    "{secrets: CANARY}",
    "{key: a, secret: CANARY, CANARY}",
    "{secret: *CANARY}",
    "{secret: !CANARY x}",
    "{secret: !x!CANARY x}",
    "{secret: !!python/name:CANARY x}",
    "{secret: &CANARY [a]}",
    '{secret: "CANARY}',
    "{secret: CANARY",
    "{secret: @CANARY}",
    "{secret: %CANARY}",
    "{? [CANARY] : a}",
    "\n  key: a\n secret: CANARY",
    "\n  key: a\n\tsecret: CANARY",
    "\n  key: a\n  secret CANARY",
    "\n  secret: CANARY: x",
    "\n  secret: |CANARY",
    "\n  secret: CANARY\0",
    "\n  <<: CANARY",
    "\n  <<: {CANARY: 1}",
    "{endpoint_url: 'http://user:CANARY@h:1'}",
    "{endpoint_url: 'http://CANARY@h:1'}",
    "{endpoint_url: 'http://h:1/?token=CANARY'}",
    "{endpoint_url: [CANARY]}",
    "{anon: CANARY}",
    "{region: [CANARY]}",
    "{secret: CANARY, nonsense: 1}",
]
URIS = [
    f"s3://AKIA:{CANARY}@bucket/a",
    f"s3://AKIA:{BASE64}@bucket/a",
    f"s3://{CANARY}@bucket/a",
    f"http://user:{CANARY}@127.0.0.1/a.tar",
    f"https://{CANARY}@127.0.0.1/a.tar",
    f"https://127.0.0.1/a.tar?token={CANARY}",
    f"https://127.0.0.1/a.tar?x=1&access_token={CANARY}#b",
    f"s3://bucket/a.tar?X-Amz-Credential=a&X-Amz-Signature={CANARY}",
    f"ftp://user:{CANARY}@h/a",
    f"gs://a:{CANARY}@bucket/../a",
    f"s3://AKIA:{CANARY}@bucket/a::s3://AKIA:{CANARY}@b",
]


@pytest.fixture(autouse=True)
def _nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO)
    yield
    assert "CANARY" not in caplog.text


def paths_of(value: Any, wanted: type, path: str = "") -> Iterator[str]:
    """Paths of a job's fields of a given type."""
    for field in dataclasses.fields(value):
        inner, here = getattr(value, field.name), f"{path}.{field.name}".strip(".")
        if isinstance(inner, wanted) or (field.name == "storage" and wanted is StorageOptions):
            yield here
        if dataclasses.is_dataclass(inner) and not isinstance(inner, StorageOptions):
            yield from paths_of(inner, wanted, here)


def with_text(job: dict[str, Any], path: str, text: str) -> str:
    """The YAML of a job with a raw text at a path."""
    values: dict[str, Any] = json.loads(json.dumps(job))
    *parents, last = path.split(".")
    parent_values = values
    for parent in parents:
        parent_values = parent_values.setdefault(parent, {})
    parent_values.pop(last, None)
    whole = yaml.safe_dump(values, sort_keys=False)
    if not parents:
        return f"{whole}{last}: {text}\n"
    indented = text.replace("\n", "\n" + "  " * len(parents))
    head = f"{parents[0]}:\n"
    rest = whole.partition(head)
    if len(parents) > 1 or not rest[1]:  # nested deeper: only the text matters
        return f"{whole}nested: {{{last}: {text}}}\n"
    return f"{rest[0]}{head}  {last}: {indented}\n{rest[2]}"


def check_output(tmp_path: Path, text: str, *options: str) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    ended = CliRunner().invoke(main, ["check", str(path), *options])
    assert ended.exception is None or isinstance(ended.exception, SystemExit), repr(ended.exception)
    assert "Traceback" not in ended.output
    return ended.output


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job["kind"])
@pytest.mark.parametrize("storage", STORAGES)
def test_no_error_about_storage_shows_its_values(tmp_path: Path, job: dict[str, Any], storage: str) -> None:
    spec = parse_job(json.loads(json.dumps(job)), "job")
    for path in paths_of(spec, StorageOptions):
        text = with_text(job, path, storage.replace("CANARY", CANARY))
        with pytest.raises(SpecError) as caught:
            parse_job(parse_yaml(text, "job.yaml"), "job.yaml")
        assert "CANARY" not in str(caught.value) and "job.yaml: " in str(caught.value), path
    assert "CANARY" not in check_output(tmp_path, with_text(job, "storage", storage.replace("CANARY", CANARY)))


@pytest.mark.parametrize("uri", URIS)
def test_no_uri_with_credentials_is_accepted_or_shown(tmp_path: Path, uri: str) -> None:
    assert "CANARY" not in redacted(f"{uri}: cannot be read ('{uri}')")
    with pytest.raises(SpecError) as caught:
        normalise_uri(uri)
    assert "CANARY" not in str(caught.value)
    for job in JOBS:
        spec = parse_job(json.loads(json.dumps(job)), "job")
        for path in paths_of(spec, str):
            if path.rsplit(".", 1)[-1] in ("uri", "artifact", "output", "extend", "heatmaps"):
                message = check_output(tmp_path, yaml.safe_dump(job), "--set", f"{path}={uri}")
                assert "CANARY" not in message and message, (path, message)


def test_no_error_about_an_override_shows_its_value(tmp_path: Path) -> None:
    job = yaml.safe_dump(JOBS[0])
    for override in (
        f"storage.secret=[{CANARY}]",
        f"storage.secret.x={CANARY}",
        f"storage.secret: {CANARY}",
        f"storage={CANARY}",
        f"storage=[{CANARY}]",
        f"storage={{secret:{CANARY}}}",
        f"storage.{CANARY}=1",
        f"source.storage={CANARY}",
        f"storage.secret=!{CANARY} x",
        f"storage.secret=&{CANARY} [*{CANARY}]",
        f"storage.secret.x:{CANARY}=1",
        f"kind={{storage: {CANARY}}}",
    ):
        message = check_output(tmp_path, job, "--set", override)
        assert "CANARY" not in message and "Error" in message, (override, message)


@pytest.mark.parametrize(
    "text", ["CANARY", "[CANARY]", "[{token: [CANARY]}]", "[{sha256: CANARY}]", "[{token: CANARY}]", "- token: *CANARY",
             "- {token: 'CANARY}", "[{CANARY: 1}]", "[{name: a, token:CANARY, scopes: [score]}]"]
)  # fmt: skip
def test_no_error_about_a_tokens_file_shows_a_token(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(text.replace("CANARY", CANARY))
    spec = parse_job({"kind": "serve", "detectors": {"a": {"artifact": "b"}}, "tokens_file": str(path)}, "job")
    assert isinstance(spec, ServeSpec)
    with pytest.raises(SpecError) as caught:
        read_tokens(spec)
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8265: no Ray dashboard answers there.",
        "s3://bucket: the bucket is not there (http://127.0.0.1:9000).",
        "tar://a:b@c.png::s3://bucket/a@b/d:e?f.tar: cut",
        "file:///data/a:b@c.png, memory://x@y, abfs://box@account.dfs.core.windows.net/a",
        "s3://arn:aws:s3:eu-west-1:123:accesspoint/line4/a.tar",
        "http://[::1]:8000/a@b.png and ray://head:10001/",
    ],
)
def test_uris_without_credentials_are_not_redacted(text: str) -> None:
    assert redacted(text) == text
    assert redacted(f"s3://K:{CANARY[:20]}...") == "s3://***"  # cut off before its `@`


def test_errors_of_storage_libraries_are_redacted() -> None:
    for text in (
        f'Could not connect to the endpoint URL: "http://u:{CANARY}@h:1/b?X-Amz-Signature={CANARY}"',
        f"SignatureDoesNotMatch secret_key={CANARY} token: {CANARY}",
        f"404, message='Not Found', url='https://h/a?sig={CANARY}'",
    ):
        for verb in ("read", "list"):
            assert "CANARY" not in str(translate("s3://b/a", verb, OSError(text)))
    assert "CANARY" not in str(RaydetectError(f"s3://a:{CANARY}@b/c: gone"))


def test_specs_show_no_keys() -> None:
    """Ray Data and Ray Train convert job arguments to plain values for the dashboard, dataclasses by `asdict`."""
    for job in JOBS:
        values = {**job, "storage": {"key": CANARY, "secret": CANARY, "token": CANARY}}
        spec = parse_job(values, "job")
        storage = Storage(spec.storage)
        for shown in (repr(spec), str(spec), json.dumps(public_spec(spec)), repr(storage), str({"spec": spec})):
            assert "CANARY" not in shown
        for held in ({"spec": spec}, storage, [spec.storage]):
            assert "CANARY" not in repr(sanitize_for_struct(held, 10_000))
        assert storage.fsspec_options("s3://b/a")["secret"] == CANARY  # but they are used
    assert StorageOptions(secret=CANARY).secret.get_secret_value() == CANARY  # type: ignore[arg-type, union-attr]
    assert "CANARY" not in repr(WebhookSpec(url=f"https://h/{CANARY}"))


def test_ray_jobs_receive_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray lists the entrypoint and environment of a job, but not its working directory."""
    submitted: dict[str, Any] = {}

    class Client:
        def __init__(self, address: str) -> None:
            assert address == "http://head:8265"

        def submit_job(self, **options: Any) -> str:
            submitted.update(options)
            submitted["text"] = (Path(options["runtime_env"]["working_dir"]) / "job.yaml").read_text()
            return "job-1"

    monkeypatch.setattr(submit, "JobSubmissionClient", Client)
    values = {**JOBS[0], "storage": {"secret": CANARY}}
    submit.submit("http://head:8265", values)
    assert parse_yaml(submitted.pop("text"), "job") == values and "CANARY" not in repr(submitted)
    assert sorted(submitted) == ["entrypoint", "runtime_env"] and sorted(submitted["runtime_env"]) == ["working_dir"]


def test_a_fit_a_run_its_report_exports_and_an_audit_contain_no_secret(tmp_path: Path) -> None:
    pack(f"file://{tmp_path}/normal", ".tar", normal_files(24), 1)
    pack(f"file://{tmp_path}/day", ".tar", mixed_files(6, 1), 2)
    secrets = {"key": CANARY, "secret": CANARY, "token": CANARY}
    source = {"uri": f"{tmp_path}/day", "storage": secrets}
    jobs = {
        "fit": {
            "source": {"uri": f"{tmp_path}/normal", "storage": secrets},
            "detector": {"name": "patchcore", "preset": "smoke", "params": {"weights": "random"}},
            "artifact": f"{tmp_path}/out/artifact",
            "calibration": {"holdout_ratio": 0.5},
        },
        "score": {
            "source": source,
            "artifact": f"{tmp_path}/out/artifact",
            "sink": {"uri": f"{tmp_path}/out/results", "storage": secrets},
            "flag": {"alpha": 0.1},
        },
        "audit": {
            "source": source,
            "artifact": f"{tmp_path}/out/artifact",
            "sink": {"uri": f"{tmp_path}/out/audits", "storage": secrets},
            "flag": {"alpha": 0.1},
        },
    }
    messages = []
    for kind, values in jobs.items():
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump({"kind": kind, **values, "storage": secrets}))
        for command in ("check", kind):
            local = ["--local"] if command == kind else []
            ended = CliRunner().invoke(main, [command, f"{tmp_path}/{kind}.yaml", *local])
            assert ended.exit_code == 0, ended.output
            messages.append(ended.output)
    results = f"{tmp_path}/out/results"
    for arguments in (
        ["plan", f"{tmp_path}/score.yaml"],
        ["status", results, "--json"],
        ["report", results, "-o", f"{tmp_path}/out/r.html"],
        ["export", results, "--as", "csv", "-o", f"{tmp_path}/out/r.csv"],
        ["score", f"{tmp_path}/score.yaml", "--local", "--set", "batch_size=3"],  # refused: another job
    ):
        messages.append(CliRunner().invoke(main, arguments).output)
    assert "batch_size: 16 -> 3" in messages[-1]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 15 and not any(b"CANARY" in path.read_bytes() for path in files)
    assert not any("CANARY" in text for text in messages)
