"""The endpoints in one process: scores, bad images, new versions, the OpenAPI document."""

import asyncio
import base64
import io
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from raydetect.artifacts.fleet import ArtifactRef
from raydetect.artifacts.store import Artifact, StoredDetectors
from raydetect.config import ScoreSpec, parse_job
from raydetect.errors import ArtifactError, SpecError, StorageError
from raydetect.gateway.backend import Busy, Served
from raydetect.gateway.http import examples
from raydetect.gateway.http import schemas as bodies
from raydetect.gateway.http.app import build_app
from raydetect.gateway.runs import archive_runs
from raydetect.local import jobs
from raydetect.local.serving import LocalBackend
from raydetect.planning.plan import plan_score
from raydetect.storage import Storage
from tests.builders.archives import mixed_files
from tests.builders.images import defect_image, encode, normal_image
from tests.builders.server import NOBODY, SCORE, client, files, fit_small, make_place, run, serve_spec
from tests.whole_jobs.runs import rows_of


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_place`."""
    return make_place(tmp_path_factory.mktemp("gateway"))


async def chunked() -> AsyncIterator[bytes]:
    """A body without a Content-Length."""
    for _ in range(21):
        yield b" " * 100_000


def test_scores_are_those_of_a_job_and_heatmaps_come_inline_or_by_uri(data_dir: Path) -> None:
    spec = serve_spec(data_dir)
    names = [name for name, _ in mixed_files(6, 2, masks=False)]
    pictures = [data for _, data in mixed_files(6, 2, masks=False)]
    job = parse_job(
        {
            "kind": "score",
            "source": {"uri": f"{data_dir}/open/mixed"},
            "artifact": f"{data_dir}/models/one",
            "sink": {"uri": f"{data_dir}/truth", "heatmaps": "all"},
            "flag": {"alpha": 0.1},
            "batch_size": 4,
        },
        "score",
    )
    assert isinstance(job, ScoreSpec)
    jobs.score(plan_score(job), lambda *_: None)
    rows = {row["key"].partition("#")[2]: row for row in rows_of(f"file://{data_dir}/truth", Storage())}

    async def work() -> tuple[Any, Any]:
        async with client(spec) as c:
            inline = await c.post(SCORE, files=files(*pictures), data={"heatmaps": "all"})
            stored = await c.post(SCORE, files=files(*pictures), data={"heatmaps": "flagged", "store_heatmaps": "true"})
            return inline, stored

    inline, stored = run(work())
    assert inline.status_code == stored.status_code == 200, inline.text
    results = inline.json()["results"]
    assert len(results) == len(names)
    for name, found, kept in zip(names, results, stored.json()["results"], strict=True):
        row = rows[name]
        assert found["image_score"] == pytest.approx(row["image_score"], rel=1e-6)
        assert (found["p_value"], found["flagged"]) == (row["p_value"], row["flagged"])
        assert (found["width"], found["height"], found["artifact"]) == (row["width"], row["height"], row["artifact"])
        assert (found["regions"] is None) == (row["regions"] is None) == (not row["flagged"])
        for region, told in zip(row["regions"] or (), found["regions"] or (), strict=True):
            assert told.pop("peak_score") == pytest.approx(region.pop("peak_score"), rel=1e-6) and told == region
        assert found["regions_left_out"] == row["regions_left_out"]
        picture = Image.open(io.BytesIO(base64.b64decode(found["heatmap_png"])))
        assert picture.size == (row["width"], row["height"])
        assert (kept["heatmap_uri"] is not None) == kept["flagged"] and kept["heatmap_png"] is None
        if kept["flagged"]:
            assert Storage().read(kept["heatmap_uri"]) == base64.b64decode(found["heatmap_png"])


def test_a_bad_image_among_good_ones_is_an_entry_and_all_bad_is_422(data_dir: Path) -> None:
    good = [encode(normal_image(i)) for i in range(9)]
    noted = io.BytesIO()
    Image.open(io.BytesIO(good[0])).save(noted, "PNG", exif=b"Exif\0\0no TIFF header")
    good[0] = noted.getvalue()
    broken = good[0][: len(good[0]) // 2]
    bomb = io.BytesIO()
    Image.new("1", (3000, 3000)).save(bomb, "PNG")

    async def work() -> list[Any]:
        async with client(serve_spec(data_dir)) as c:
            mixed = await c.post(SCORE, files=files(*good, broken))
            bad = await c.post(SCORE, files=files(broken, b"", b"text", bomb.getvalue()))
            return [mixed, bad]

    mixed, bad = run(work())
    assert mixed.status_code == 200
    assert [entry["status"] for entry in mixed.json()["results"]] == ["ok"] * 9 + ["corrupt"]
    assert [entry["note"] for entry in mixed.json()["results"]] == ["exif_ignored"] + [""] * 9
    last = mixed.json()["results"][-1]
    assert last["image_score"] is None and last["flagged"] is None and "decoded" in last["error"]
    assert bad.status_code == 422 and "none of 4 images" in bad.json()["detail"]
    statuses = [entry["status"] for entry in bad.json()["results"]]
    assert statuses == ["corrupt", "empty", "not_an_image", "too_many_pixels"]
    assert "more than limits.max_pixels = " in bad.json()["results"][-1]["error"]  # not that of a job


def test_unknown_names_and_malformed_requests_are_reported(data_dir: Path) -> None:
    picture = encode(normal_image(1))

    async def work() -> list[Any]:
        async with client(serve_spec(data_dir)) as c:
            return [
                await c.post("/v1/detectors/botle/score", files=files(picture)),
                await c.get("/v1/detectors/botle"),
                await c.post(SCORE, files=files(picture), data={"heatmap": "all"}),
                await c.post(SCORE, files=files(picture), data={"heatmaps": "some"}),
                await c.post(SCORE, data={"images": "no file"}, files=[("x", ("x", b""))]),
                await c.post(SCORE, content=b"x", headers={"content-type": "image/png"}),
                await c.post(SCORE, content=b"{", headers={"content-type": "application/json"}),
                await c.post(SCORE, content=b"x", headers={"content-type": "multipart/form-data"}),
                await c.post(SCORE, files=files(*[picture] * 13)),
                await c.post(SCORE, content=b"x" * 2_100_000, headers={"content-type": "application/json"}),
                await c.post(SCORE, content=chunked(), headers={"content-type": "application/json"}),
                await c.get("/v1/nothing"),
            ]

    answers = run(work())
    statuses = [answer.status_code for answer in answers]
    assert statuses == [404, 404, 422, 422, 422, 415, 422, 400, 413, 413, 413, 404], [a.text for a in answers]
    assert "Did you mean 'bottle'?" in answers[0].json()["detail"]
    assert all(isinstance(answer.json()["detail"], str) for answer in answers)


def test_a_new_version_replaces_the_old_and_every_response_names_its_version(data_dir: Path) -> None:
    picture = encode(defect_image(1, "blob")[0])

    async def work() -> list[Any]:
        async with client(serve_spec(data_dir)) as c:
            before = await c.post(SCORE, files=files(picture))
            outside = await c.put("/v1/detectors/bottle", json={"artifact": f"{data_dir}/elsewhere"})
            missing = await c.put("/v1/detectors/bottle", json={"artifact": f"{data_dir}/models/none"})
            changed = await c.put("/v1/detectors/bottle", json={"artifact": f"{data_dir}/models/two"})
            after = await c.post(SCORE, files=files(picture))
            return [before, outside, missing, changed, after]

    before, outside, missing, changed, after = run(work())
    assert [a.status_code for a in (before, outside, missing, changed, after)] == [200, 403, 422, 200, 200], (
        missing.text
    )
    assert before.json()["artifact"] != after.json()["artifact"] == changed.json()["artifact"]
    assert after.json()["results"][0]["artifact"] == after.json()["artifact"]
    assert before.json()["results"][0]["image_score"] != after.json()["results"][0]["image_score"]


def test_a_detector_is_loaded_during_requests(data_dir: Path) -> None:
    """To truncate a backbone, torch.fx patches module calls in all threads."""
    spec = serve_spec(data_dir, resources={"detectors_in_memory": 1})  # so that each version is reloaded
    pictures = files(encode(normal_image(1)))

    async def work() -> list[tuple[int, str]]:
        seen: list[tuple[int, str]] = []
        async with client(spec) as c:

            async def ask() -> None:
                while len(changed) < 6:
                    answer = await c.post(SCORE, files=pictures)
                    seen.append((answer.status_code, answer.json().get("artifact", "")))

            changed: list[int] = []
            asking = [asyncio.create_task(ask()) for _ in range(3)]
            for number in range(6):
                artifact = f"{data_dir}/models/{('one', 'two')[number % 2]}"
                changed.append((await c.put("/v1/detectors/bottle", json={"artifact": artifact})).status_code)
                answered = len(seen)
                while number < 5 and len(seen) < answered + 6:
                    await asyncio.sleep(0.01)
            await asyncio.gather(*asking)
            assert changed == [200] * 6
        return seen

    seen = run(work())
    assert {status for status, _ in seen} == {200} and len({version for _, version in seen}) == 2


class Broken(LocalBackend):
    """Fails with a message that clients must not see."""

    error: Exception

    async def answer(self, served: Served, members: Any, heatmaps: Any) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError, 500), (ArtifactError, 503), (StorageError, 503), (SpecError, 503), (Busy, 503)],
)
def test_internal_errors_are_not_shown_to_clients(data_dir: Path, error: type[Exception], status: int) -> None:
    spec = serve_spec(data_dir)
    backend = Broken(spec)
    backend.error = error("s3://hidden/model: key AKIA0001" if error is not Busy else "not just now.")

    async def work() -> httpx.Response:
        transport = httpx.ASGITransport(app=build_app(spec, NOBODY, backend), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as c:
            return await c.post(SCORE, files=files(encode(normal_image(1))))

    answer = run(work())
    assert answer.status_code == status and ("retry-after" in answer.headers) == (status == 503)
    assert not {"hidden", "AKIA0001", "Traceback", str(data_dir)} & set(re.split(r"[\s:/]+", answer.text))


def test_the_least_recently_used_detector_is_evicted(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_small(data_dir, "three", seed=2)
    loaded: list[str] = []
    load = StoredDetectors.load

    def counted(self: StoredDetectors, ref: ArtifactRef) -> Artifact:
        loaded.append(ref.uri.rpartition("/")[2])
        return load(self, ref)

    monkeypatch.setattr(StoredDetectors, "load", counted)
    flag, names = {"alpha": 0.1}, ("one", "two", "three")
    served = {name: {"artifact": f"{data_dir}/models/{name}", "flag": flag} for name in names}
    spec = serve_spec(data_dir, detectors=served, resources={"detectors_in_memory": 2})
    pictures = files(encode(defect_image(1, "blob")[0]))
    asked = ("one", "two", "one", "three", "one", "two")

    async def work() -> list[float]:
        async with client(spec) as c:
            loaded.clear()
            answers = [await c.post(f"/v1/detectors/{name}/score", files=pictures) for name in asked]
            return [answer.json()["results"][0]["image_score"] for answer in answers]

    scores = run(work())
    assert len({*scores}) == 3 and scores[0] == scores[2] == scores[4] and scores[1] == scores[5]
    assert loaded == ["one", "two", "three", "two"]  # "one" was used in between, so "two" was evicted


def test_the_document_describes_every_endpoint(data_dir: Path) -> None:
    async def work() -> Any:
        async with client(serve_spec(data_dir)) as c:
            return (await c.get("/openapi.json")).json()

    document = run(work())
    assert set(document["paths"]) == {
        "/healthz", "/readyz", "/v1/detectors", "/v1/detectors/{name}", "/v1/detectors/{name}/score", "/v1/archives",
        "/v1/archives/{id}", "/v1/archives/{id}/report",
    }  # fmt: skip
    bodies = document["paths"]["/v1/detectors/{name}/score"]["post"]["requestBody"]["content"]
    assert set(bodies) == {"application/json", "multipart/form-data"}


def test_every_body_of_the_document_has_an_example_that_fits(data_dir: Path) -> None:
    async def work() -> Any:
        async with client(serve_spec(data_dir)) as c:
            return (await c.get("/openapi.json")).json()

    document = run(work())
    named = set()
    for path, methods in document["paths"].items():
        if path in ("/healthz", "/readyz") or path.endswith("/report"):  # no schemas of ours
            continue
        for operation in methods.values():
            contents = [
                answer["content"] for status, answer in operation["responses"].items() if status.startswith("2")
            ]
            contents += [operation["requestBody"]["content"]] if "requestBody" in operation else []
            for content in contents:
                schema = content["application/json"]["schema"]
                name = schema["$ref"].rpartition("/")[2]
                (example,) = document["components"]["schemas"][name]["examples"]
                getattr(bodies, name).model_validate(example)
                named.add(name)
    assert named == {
        "DetectorAnswer", "Detectors", "NewArtifact", "RunAnswer", "RunRequest", "Runs", "ScoreAnswer", "ScoreRequest",
    }  # fmt: skip
    assert archive_runs.uri_of(examples.RUN["id"]) == examples.RUN["uri"]
