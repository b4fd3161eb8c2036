"""Audits: three nights raise the right alarm and no other, nothing is scored twice, and the webhook is told once."""

import contextlib
import hashlib
import hmac
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path, PurePath
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from raydetect.audit.nights import Nights
from raydetect.audit.run import Audit
from raydetect.audit.webhook import ALLOW, SECRET, WebhookError, signature, webhook_of
from raydetect.cli.main import main
from raydetect.config import AuditSpec, WebhookSpec, parse_job
from raydetect.errors import SpecError
from raydetect.local import jobs
from raydetect.planning.plan import ScorePlan
from raydetect.records import Receipt
from raydetect.sinks.scored_chunk import ScoredChunk
from raydetect.storage import Storage
from tests.builders.nights import CATEGORY, EACH, RULES, add_night, audit_job, fit_line, fit_lines

KEY = "a secret of the webhook's own"


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fitted artifact."""
    folder = tmp_path_factory.mktemp("line")
    fit_line(folder)
    return folder


@pytest.fixture
def place(line: Path, tmp_path: Path) -> Path:
    """A fresh archive beside the artifact."""
    (tmp_path / "artifact").symlink_to(line / "artifact")
    return tmp_path


def job(folder: Path, **changes: Any) -> str:
    path = folder / "audit.yaml"
    path.write_text(yaml.safe_dump(audit_job(folder, **changes)))
    return str(path)


def summary(folder: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "audits" / "summaries" / f"{number:05d}.json").read_text())
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def spec_of(folder: Path, **changes: Any) -> AuditSpec:
    spec = parse_job(audit_job(folder, **changes), "audit")
    assert isinstance(spec, AuditSpec)
    return spec


def test_each_night_raises_its_own_alarm_and_no_other(place: Path) -> None:
    nights = [
        ("2026-11-20", "normal", []),
        ("n2", "normal", []),
        ("n3", "dirty", ["dirty lens"]),
        ("n4", "bad", ["bad parts"]),
        ("n5", "normal", []),
        ("n6", "broken", ["broken files"]),
        ("n7", "dim", ["other light"]),
    ]
    path = job(place)
    for number, (name, kind, alarms) in enumerate(nights, start=1):
        add_night(place, name, kind, first=1000 * number)
        ended = call("audit", path, "--local", "--set", f"night={name}")
        found = summary(place, number)
        told = {rule["name"]: rule["values"] for rule in found["rules"]}
        assert found["alarms"] == alarms, (name, told)
        assert ended.exit_code == (4 if alarms else 0), ended.output
        assert found["images"] == EACH and found["shards"] == 2 and found["night"] == name
        assert f"Audit {name}: {EACH} images in 2 new shards" in ended.output
        report = (place / "audits" / "nights" / f"{number:05d}" / "report.html").read_text()
        assert (f"Alarm: {alarms[0]}" in report) if alarms else ("No alarm" in report)
    assert found["baseline"]["nights"] == ["n5", "n2", "2026-11-20"]  # those with an alarm are not what is usual
    assert "Scores</figcaption>" in report and "night by night" in report
    assert "ready to audit" in call("check", path).output


def test_a_fleet_is_audited_by_p_values_and_told_by_category(tmp_path: Path) -> None:
    fit_lines(tmp_path, ["left", "right"])
    source = {"uri": f"{tmp_path}/archive", "pattern": CATEGORY}
    # Which images are held out follows from their paths, so chance alone may flag a tenth of the normal ones.
    rules = [rule.replace("flagged_rate_low > 0.08", "flagged_rate_low > 0.2") for rule in RULES]
    path = job(tmp_path, source=source, alarm_when=rules)
    for number, kind in enumerate(["normal", "normal", "bad"], start=1):
        for place, category in enumerate(["left", "right"]):
            add_night(tmp_path, category, kind, first=10_000 * number + 1000 * place)  # writes over the last night's
        ended = call("audit", path, "--local")
        found = summary(tmp_path, number)
        assert found["images"] == 2 * EACH and found["shards"] == 4, found
        assert found["alarms"] == (["bad parts"] if kind == "bad" else []), found["rules"]
        assert ended.exit_code == (4 if kind == "bad" else 0), ended.output
        assert 1 / 41 <= found["measures"]["score_median"] <= 1  # of p-values from 40 held-out images
    report = (tmp_path / "audits" / "nights" / "00003" / "report.html").read_text()
    assert ">left</" in report and ">right</" in report
    add_night(tmp_path, "middle", "normal", 90_000)
    assert call("audit", path, "--local").exit_code == 4  # a category without a detector has no score
    assert summary(tmp_path, 4)["alarms"] == ["broken files"]
    assert summary(tmp_path, 4)["measures"]["bad_rate"] == 1


def test_the_same_night_twice_gives_the_same_audit(place: Path) -> None:
    add_night(place, "a", "normal", 0)
    path = job(place)
    assert call("audit", path, "--local").exit_code == 0
    before = files(place / "audits")
    again = call("audit", path, "--local")
    assert again.exit_code == 0 and f"Audit night-00001: {EACH} images in 2 new shards" in again.output
    assert files(place / "audits") == before
    named = call("audit", path, "--local", "--set", "night=night-00001")
    assert named.exit_code == 0 and files(place / "audits") == before
    changed = call("audit", path, "--local", "--set", "alarm_when=['too many: images > 5']")
    assert changed.exit_code == 4 and "alarm: night-00001: too many" in changed.output
    assert call("audit", path, "--local").exit_code == 0 and files(place / "audits") == before


def test_only_what_is_new_is_scored(place: Path) -> None:
    add_night(place, "a", "normal", 0, count=6)
    scored: list[list[str]] = []

    def score(plan: ScorePlan) -> object:
        scored.append([Path(shard.uri).name for shard in plan.todo])
        return jobs.score(plan, lambda *_: None)

    def audit(**changes: Any) -> list[str]:
        made = Audit.of(spec_of(place, **changes))
        return [made.run(claim, score)["night"] for claim in made.pending()]

    assert audit() == ["night-00001"] and scored == [["a-0.tar", "a-1.tar"]]
    add_night(place, "b", "normal", 50, count=6)
    (place / "archive" / "a-1.tar").write_bytes((place / "archive" / "b-1.tar").read_bytes())  # another content
    assert audit() == ["night-00002"] and scored[1:] == [["a-1.tar", "b-0.tar", "b-1.tar"]]
    assert audit() == ["night-00002"] and audit(night="night-00001") == ["night-00001"] and len(scored) == 2
    assert audit(night="later") == ["later"] and scored[2:] == [[]]
    assert summary(place, 3)["images"] == 0
    assert summary(place, 3)["alarms"] == ["no images"]


def first_shard_only(plan: ScorePlan) -> object:
    """Scores until the first shard is committed, then stops."""

    def stop(done: ScoredChunk | Receipt) -> None:
        if isinstance(done, ScoredChunk) and done.facts.shard:
            end = time.monotonic() + 20
            while plan.ledger.committed() != {0}:
                assert time.monotonic() < end
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "READERS", 1)
        patch.setattr(jobs, "CHUNKS_IN_FLIGHT", 1)  # one chunk after the other
        return jobs.score(plan, stop)


def test_a_killed_audit_goes_on_with_its_own_shards(place: Path) -> None:
    add_night(place, "a", "normal", 0, count=6)
    made = Audit.of(spec_of(place, chunk_images=1))

    (claim,) = made.pending()
    with pytest.raises(InterruptedError):
        made.run(claim, first_shard_only)
    add_night(place, "b", "normal", 50, count=6)
    seen: list[list[str]] = []

    def rest(plan: ScorePlan) -> object:
        seen.append([Path(shard.uri).name for shard in plan.todo])
        return jobs.score(plan, lambda *_: None)

    again = Audit.of(spec_of(place, chunk_images=1))
    assert [again.run(claim, rest)["night"] for claim in again.pending()] == ["night-00001", "night-00002"]
    assert seen == [["a-1.tar"], ["b-0.tar", "b-1.tar"]]


@pytest.mark.parametrize("what", ["overwritten", "deleted"])
def test_a_shard_that_changed_before_its_night_was_scored_is_of_the_next_night(place: Path, what: str) -> None:
    add_night(place, "a", "normal", 0, count=6)
    made = Audit.of(spec_of(place))

    (claim,) = made.pending()
    with pytest.raises(InterruptedError):
        made.run(claim, first_shard_only)
    second = place / "archive" / "a-1.tar"
    if what == "deleted":
        second.unlink()
    else:
        shutil.copy(place / "archive" / "a-0.tar", second)
    for _ in range(2):
        assert call("audit", job(place), "--local").exit_code == 0
    first = summary(place, 1)
    assert first["images"] == 3
    if what == "overwritten":
        assert summary(place, 2)["images"] == 3
    keys = [
        row["key"]
        for number in range(1, 4)
        for part in sorted((place / f"audits/nights/{number:05d}/results/scores").rglob("*.parquet"))
        for row in pq.ParquetFile(part).read(columns=["key"]).to_pylist()
    ]
    assert len(keys) == len(set(keys)) == (6 if what == "overwritten" else 3)
    told = json.loads((place / "audits/nights/00001/results/manifest.json").read_text())["left_out"]
    assert told["withdrawn"]["count"] == 1 and told["withdrawn"]["names"][0].endswith("a-1.tar")


def test_loose_images_and_other_artifacts(place: Path) -> None:
    from tests.builders.archives import normal_files, pack

    pack(f"file://{place}/archive", "", normal_files(5), 1)
    path = job(place)
    assert call("audit", path, "--local").exit_code == 0 and summary(place, 1)["images"] == 5
    nights = Nights(f"file://{place}/audits", Storage())
    assert nights.claims()[0].shards[0].listing  # enough to score it again as it was
    record = place / "audits" / "summaries" / "00001.json"
    record.write_text(record.read_text().replace(summary(place, 1)["artifact"], "0" * 64))
    pack(f"file://{place}/archive/more", "", normal_files(3, start=700), 1)
    assert call("audit", path, "--local").exit_code == 0
    assert summary(place, 2)["baseline"] == {"nights": [], "images": 0}
    outcomes = {rule["name"]: rule["outcome"] for rule in summary(place, 2)["rules"]}
    assert outcomes["dirty lens"] == "not judged" and outcomes["broken files"] == "calm"


def images_of(place: Path) -> list[list[str]]:
    """The names of the images of every night."""
    return [
        sorted(
            PurePath(row["key"].replace("#", "/")).name
            for part in (night / "results/scores").rglob("*.parquet")
            for row in pq.ParquetFile(part).read(columns=["key"]).to_pylist()
        )
        for night in sorted((place / "audits/nights").iterdir())
    ]


def test_loose_images_are_of_one_night_however_they_are_listed(place: Path) -> None:
    """A folder, globs of files and of folders, late images between others, and an image that was taken anew."""
    from tests.builders.archives import normal_files, pack

    def night(name: str, **source: Any) -> None:
        given = {"shard_images": 3, **source}
        ended = call("audit", job(place, night=name, source=given), "--local")
        assert ended.exit_code == 0, ended.output

    names = [name.rpartition("/")[2] for name, _ in normal_files(12)]
    files = {name: data for name, (_, data) in zip(names, normal_files(12), strict=True)}

    def add(folder: str, *numbers: int) -> None:
        pack(f"file://{place}/nights/{folder}", "", [(names[i], files[names[i]]) for i in numbers], 1)

    add("01", 0, 1, 2, 5)
    night("01", uri=f"{place}/nights/01")
    add("02", 6, 7)
    night("02", uri=f"{place}/nights/*/*.png")
    add("02", 4)  # late, and between others
    add("03", 8, 9, 10)
    night("03", uri=f"{place}/nights/*")
    (place / "nights/01" / names[1]).write_bytes(files[names[11]])
    night("04", uri=[f"{place}/nights/0[12]", f"{place}/nights/03"])
    found = [[names.index(name) for name in found] for found in images_of(place)]
    assert found == [[0, 1, 2, 5], [6, 7], [4, 8, 9, 10], [1]]
    before = images_of(place)
    assert (
        "Compared with one earlier night (01), 4 images together."
        in (place / "audits/nights/00002/report.html").read_text()
    )
    for command in ("status", "verify", "report"):
        refused = call(command, f"{place}/audits")
        assert refused.exit_code == 2 and f"{place}/audits/nights/00001/results. Name one of them." in refused.output
    night("04", uri=f"{place}/nights/")
    assert images_of(place) == before


def test_a_killed_night_of_regrouped_images_goes_on(place: Path) -> None:
    from tests.builders.archives import normal_files, pack

    files = normal_files(9)
    pack(f"file://{place}/archive", "", files[::2], 1)
    assert call("audit", job(place), "--local").exit_code == 0
    pack(f"file://{place}/archive", "", files[1::2], 1)
    (claim,) = Audit.of(spec_of(place)).pending()  # claimed, and then killed
    pack(f"file://{place}/archive", "", normal_files(2, start=800), 1)
    for _ in range(2):
        assert call("audit", job(place), "--local").exit_code == 0
    assert [len(night) for night in images_of(place)] == [5, 4, 2]
    assert all(shard.format == "prefix" for shard in claim.shards)


def test_mistakes_are_one_sentence(place: Path) -> None:
    add_night(place, "a", "normal", 0, count=4)
    wrong = {
        "Did you mean 'flagged_rate'": {"alarm_when": ["flaged_rate > 1"]},
        "RAYDETECT_WEBHOOK_ALLOW is not set": {"webhook": {"url": "https://hooks.example.com/x"}},
        "night": {"night": "../up"},
        "unknown key": {"baseline": {"night": 7}},
    }
    for message, change in wrong.items():
        for command in (["check"], ["audit", "--local"]):
            ended = call(command[0], job(place, **change), *command[1:])
            assert ended.exit_code == 2 and message in ended.output, ended.output
    assert not (place / "audits").exists()
    assert call("audit", job(place), "--local").exit_code == 0
    (place / "audits" / "claims" / "00001.json").write_text("{}")
    ended = call("audit", job(place), "--local")
    assert ended.exit_code == 1 and "is damaged" in ended.output


class Receiver(BaseHTTPRequestHandler):
    """Keeps what is posted; answers as it is told."""

    answers: ClassVar[list[int]] = []
    got: ClassVar[list[tuple[dict[str, str], bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Receiver.got.append((dict(self.headers), body))
        self.send_response(Receiver.answers.pop(0) if Receiver.answers else 204)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a webhook that is allowed."""
    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/hooks"
    monkeypatch.setenv(ALLOW, f"https://hooks.example.com/ {url}")
    monkeypatch.setenv(SECRET, KEY)
    Receiver.answers, Receiver.got = [], []
    yield url
    server.shutdown()
    server.server_close()


def test_the_webhook_is_told_once_and_signed(place: Path, hook: str) -> None:
    add_night(place, "a", "normal", 0, count=4)
    path = job(place, webhook={"url": f"{hook}/T00CANARY"})
    assert "ready to audit" in call("check", path).output and not Receiver.got
    ended = call("audit", path, "--local", "--set", "night=tonight")
    assert ended.exit_code == 0 and "Notified the webhook of tonight." in ended.output
    ((headers, body),) = Receiver.got
    assert json.loads(body) == summary(place, 1) and headers["X-Raydetect-Night"] == "tonight"
    moment, _, digest = headers["X-Raydetect-Signature"].partition(",v1=")
    expected = hmac.new(KEY.encode(), moment.removeprefix("t=").encode() + b"." + body, hashlib.sha256).hexdigest()
    assert digest == expected == signature(KEY.encode(), moment.removeprefix("t="), body)
    again = call("audit", path, "--local", "--set", "night=tonight")
    assert again.exit_code == 0 and len(Receiver.got) == 1 and "Told" not in again.output
    for path_, content in files(place / "audits").items():
        assert KEY.encode() not in content and b"CANARY" not in content, path_
    spec = spec_of(place, webhook={"url": hook}).webhook
    for text in (ended.output, repr(webhook_of(spec, {ALLOW: hook, SECRET: KEY})), repr(spec)):
        assert KEY not in text and "CANARY" not in text and "/hooks" not in text


def test_a_webhook_that_fails_is_tried_again_and_then_said(place: Path, hook: str) -> None:
    made = webhook_of(WebhookSpec(url=f"{hook}/x", attempts=3), {ALLOW: hook, SECRET: KEY})
    assert made is not None
    pauses: list[float] = []
    Receiver.answers = [500, 503]
    assert made.send("n", b"{}", pauses.append) == 204 and pauses == [1.0, 2.0] and len(Receiver.got) == 3
    Receiver.answers = [500, 429, 502]
    with pytest.raises(
        WebhookError, match=rf"{hook.removesuffix('/hooks')} did not accept .*status 502 after 3 attempts"
    ):
        made.send("n", b"{}", pauses.append)
    Receiver.answers = [301]
    with pytest.raises(WebhookError, match="status 301 after 1 attempts"):
        made.send("n", b"{}", pauses.append)
    add_night(place, "a", "normal", 0, count=4)
    path = job(place, webhook={"url": hook, "attempts": 1})
    Receiver.answers = [500]
    failed = call("audit", path, "--local")
    assert failed.exit_code == 1 and "did not accept the summary" in failed.output and KEY not in failed.output
    retold = call("audit", path, "--local")
    assert retold.exit_code == 0 and "Notified the webhook of night-00001." in retold.output
    Receiver.answers = [500]
    options = ["--set", "alarm_when=['many: images > 1']", "--set", "night=next"]
    add_night(place, "b", "normal", 90, count=4)
    both = call("audit", path, "--local", *options)
    assert both.exit_code == 4 and "did not accept the summary" in both.output and "alarm: next: many" in both.output


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nX: "], ids=["nothing", "a status and no end"])
def test_an_attempt_ends_in_time_however_slowly_the_answer_comes(sent: bytes) -> None:
    """A timeout of a socket begins anew with every byte."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            taken, _ = listener.accept()
            with taken, contextlib.suppress(OSError):
                taken.sendall(sent)
                for _ in range(100):
                    taken.sendall(b"a")
                    time.sleep(0.1)

        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        made = webhook_of(WebhookSpec(url=url, attempts=1, request_seconds=0.5), {ALLOW: url, SECRET: KEY})
        assert made is not None
        began = time.monotonic()
        with pytest.raises(WebhookError, match=r"no answer within 0\.5 s after 1 attempt"):
            made.send("n", b"{}")
    assert 0.4 < time.monotonic() - began < 3


def test_when_alarm_leaves_quiet_nights_out(place: Path, hook: str) -> None:
    add_night(place, "a", "normal", 0, count=4)
    path = job(place, webhook={"url": hook, "when": "alarm"})
    assert call("audit", path, "--local").exit_code == 0 and not Receiver.got
    assert call("audit", path, "--local", "--set", "alarm_when=['many: images > 1']").exit_code == 4
    assert len(Receiver.got) == 1


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com.evil.net/x", "https://hooks.example.com@evil.net/", "http://hooks.example.com/a",
        "file:///etc/passwd", "https://other.example.com/", "https://hooks.example.com/../..//x", "nonsense",
    ],
)  # fmt: skip
def test_other_addresses_are_refused(url: str) -> None:
    allowed = {ALLOW: "https://hooks.example.com/", SECRET: KEY}
    with pytest.raises(SpecError, match="matches no prefix"):
        webhook_of(WebhookSpec(url=url), allowed)
    assert webhook_of(None, {}) is None
    with pytest.raises(SpecError, match="fewer than 16 characters"):
        webhook_of(WebhookSpec(url="https://hooks.example.com/x"), allowed | {SECRET: "short"})


def test_an_address_of_the_cloud_s_own_is_not_connected_to() -> None:
    made = webhook_of(WebhookSpec(url="http://169.254.169.254/latest"), {ALLOW: "http://169.254.169.254/", SECRET: KEY})
    assert made is not None
    with pytest.raises(WebhookError, match="does not connect to"):
        made.send("n", b"{}", lambda _: None)
