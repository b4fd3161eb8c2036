"""Sharded memory banks: only the pieces are read, results are unchanged, and damaged files are refused."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load, save

from raydetect.artifacts.record import read_record
from raydetect.artifacts.sharded_bank import piece_search, sharded_search
from raydetect.artifacts.store import load_artifact
from raydetect.artifacts.tensor_file import TensorFile
from raydetect.artifacts.tensor_header import tensors_uri
from raydetect.blocks.search.search import split_bank
from raydetect.errors import ArtifactError, SpecError, StorageError
from raydetect.planning.plan import plan_score
from raydetect.storage import Storage
from tests.local.test_local import FIT, SCORE, data, fit, rows, run, spec_of  # noqa: F401 (a fixture)

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("data")
ARTIFACT = "memory://data/artifact"


def tensor_file() -> tuple[TensorFile, dict[str, torch.Tensor]]:
    record, storage = read_record(ARTIFACT, Storage()), Storage()
    return TensorFile.of(record, storage), load(storage.read(tensors_uri(ARTIFACT, record.body["tensors"])))


def rewrite(change: dict[str, Any], content: bytes | None = None) -> None:
    """Changes entries of the record, and the tensor file if `content` is given."""
    storage = Storage()
    record = read_record(ARTIFACT, storage)
    uri = tensors_uri(ARTIFACT, record.body["tensors"])
    if content is not None:
        storage.write(uri, content)
        change = {"tensors": {**record.body["tensors"], "bytes": len(content)}, **change}
    storage.write(f"{ARTIFACT}/artifact.json", json.dumps({**record.body, **change}).encode())


def test_tensors_read_in_parts_equal_those_of_the_whole_file() -> None:
    file, expected = tensor_file()
    found = file.read(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    bank = expected["bank"]
    for start, stop in ((0, 1), (3, 9), (len(bank) - 1, len(bank)), (0, len(bank)), (4, 4)):
        assert torch.equal(file.rows("bank", start, stop), bank[start:stop])
    for name, start, stop in (("bank", 0, len(bank) + 1), ("bank", -1, 2), ("bang", 0, 1)):
        with pytest.raises(ArtifactError, match="has no rows"):
            file.rows(name, start, stop)


def test_every_dtype_round_trips() -> None:
    tensors = {
        "a": torch.tensor([True, False, True]),
        "b": torch.tensor([[1, -2]], dtype=torch.int8),
        "c": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "d": torch.tensor([7], dtype=torch.int64),
        "e": torch.tensor(3.0, dtype=torch.float64),
        "f": torch.zeros(0, 4),
        "g": torch.tensor([9, 8, 7], dtype=torch.uint8),
    }
    rewrite({}, save(tensors))
    file = TensorFile.of(read_record(ARTIFACT, Storage()), Storage())
    for name, value in file.read(tensors).items():
        assert value.dtype == tensors[name].dtype and torch.equal(value, tensors[name])


def test_each_piece_is_read_alone_and_a_worker_reads_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    record = read_record(ARTIFACT, Storage())
    bank_bytes = record.body["bank"]["rows"] * record.body["bank"]["dims"] * 4
    read: list[int] = []
    kind = type(fsspec.filesystem("memory"))
    cat_file = kind.cat_file

    def counted(self: Any, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        content: bytes = cat_file(self, path, start=start, end=end, **options)
        read.append(len(content) if path.endswith(".safetensors") else 0)
        return content

    monkeypatch.setattr(kind, "cat_file", counted)
    TensorFile.of(record, Storage())
    header_bytes = sum(read)
    pieces = []
    for number, (start, stop) in enumerate(split_bank(record.body["bank"]["rows"], 3)):
        read.clear()
        pieces.append(piece_search(record, Storage(), number, 3, CPU))
        assert sum(read) == header_bytes + (stop - start) * record.body["bank"]["dims"] * 4
    read.clear()
    load_artifact(ARTIFACT, Storage(), pieces[0])
    assert 0 < sum(read) == record.body["tensors"]["bytes"] - bank_bytes


@pytest.mark.parametrize("pieces", [2, 5])
def test_a_job_with_a_sharded_bank_gives_the_same_rows(pieces: int) -> None:
    whole, sharded = run(), run("sink.uri=memory://data/sharded", f"resources.bank_shards={pieces}")
    strip = [
        [{k: v for k, v in row.items() if k != "heatmap_uri"} for row in rows(plan)] for plan, _ in (whole, sharded)
    ]
    assert strip[0] == strip[1] and len(strip[0]) > 10
    assert whole[1]["statuses"] == sharded[1]["statuses"]


def test_a_job_can_resume_with_another_number_of_pieces() -> None:
    run()
    plan, _ = run("resources.bank_shards=3")
    assert plan.todo == ()


def test_a_damaged_byte_anywhere_is_found_before_scoring() -> None:
    storage = Storage()
    record = read_record(ARTIFACT, storage)
    uri = tensors_uri(ARTIFACT, record.body["tensors"])
    content = storage.read(uri)
    storage.write(uri, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="sha256"):
        sharded_search(record, storage, 2, CPU)
    storage.write(uri, content[:-1])
    with pytest.raises(ArtifactError, match=f"has {len(content) - 1} bytes, the record says {len(content)}"):
        piece_search(record, storage, 0, 2, CPU)
    storage.delete(uri)
    with pytest.raises(ArtifactError, match="is missing"):
        piece_search(record, storage, 0, 2, CPU)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "damaged"),
        (b"{", "damaged"),
        (b'{"bank": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', "lies outside"),
        (b'{"bank": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "4 bytes for shape"),
        (b'{"bank": {"dtype": "X99", "shape": [1], "data_offsets": [0, 4]}}', "X99"),
        (b'{"bank": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "lies outside"),
    ],
)
def test_a_damaged_header_is_refused(header: bytes, message: str) -> None:
    rewrite({}, len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(ArtifactError, match=message):
        TensorFile.of(read_record(ARTIFACT, Storage()), Storage())


def test_a_header_longer_than_the_file_is_refused() -> None:
    rewrite({}, (1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        TensorFile.of(read_record(ARTIFACT, Storage()), Storage())


def test_a_range_past_the_end_is_refused(tmp_path: Path) -> None:
    storage, uri = Storage(), f"file://{tmp_path}/x"
    storage.write(uri, b"0123456789")
    assert storage.read_range(uri, 2, 5) == b"234" and storage.read_range(uri, 4, 4) == b""
    with pytest.raises(StorageError, match="ends before byte 11"):
        storage.read_range(uri, 2, 11)


def test_a_range_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydetect.storage.files.RANGE_BYTES", 3)
    Storage().write("memory://data/x", b"0123456789")
    assert Storage().read_range("memory://data/x", 1, 9) == b"12345678"


def test_a_bank_that_cannot_be_split_is_refused_before_anything_is_written() -> None:
    two_pieces = "resources.bank_shards=2"
    rows_of_bank = read_record(ARTIFACT, Storage()).body["bank"]["rows"]
    with pytest.raises(SpecError, match=f"has {rows_of_bank} rows. Set it lower"):
        plan_score(spec_of(SCORE, f"resources.bank_shards={rows_of_bank + 1}"))
    with pytest.raises(SpecError, match="applies to scoring jobs only"):
        spec_of(FIT, two_pieces)
    fit("detector.name=stfpm", "detector.params={backbone: resnet18, weights: random, image_size: [64, 64], epochs: 1}")
    with pytest.raises(SpecError, match=r"bank_shards = 2: the stfpm of .* has no memory bank"):
        plan_score(spec_of(SCORE, two_pieces))
    assert not Storage().exists("memory://data/results")


def test_ivfpq_records_its_recall_and_cannot_be_split() -> None:
    fit("detector.params.search=ivfpq", "detector.params.coreset_sampling_ratio=0.8")
    record = read_record(ARTIFACT, Storage())
    assert 0.3 < record.body["search"]["recall_at_1"] <= 1 and record.body["search"]["patches"] > 100
    with pytest.raises(SpecError, match="no memory bank that can be split"):
        plan_score(spec_of(SCORE, "resources.bank_shards=2"))
    run()
