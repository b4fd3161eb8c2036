"""Scores chunks. Local runs, Ray actors and Serve replicas all use the same Scorer, so their rows are equal.

Batches never span chunks and are padded to one size, so an image is processed by the same kernels for any number of
workers. With a fleet, the images of a chunk are grouped by category and batched per group, so an image gets the same
row as with its category's artifact alone. Categories that share a detector are one group: what an image gets does not
depend on the others of its batch, and its p-value, flag and heatmap are by the calibration of its category.
"""

import heapq
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from raydetect.archives.chunks import refuse_bad_member
from raydetect.artifacts.fleet import ArtifactRef
from raydetect.artifacts.store import DetectorSource
from raydetect.config import Heatmaps, ScoreSpec
from raydetect.config.validation import nearest
from raydetect.images.decode import DecodePool, Pixels, decode_and_cut, decode_stream
from raydetect.images.opening import DecodeRules
from raydetect.records import OK, AnomalousRegion, Chunk, Member, Row
from raydetect.scoring.batches import Scored, score_batches
from raydetect.scoring.detector_cache import DetectorCache, LoadedDetector
from raydetect.scoring.device_queue import DeviceQueue
from raydetect.scoring.regions import find_regions
from raydetect.sinks.close_ups import close_up_places, close_up_png
from raydetect.sinks.heatmaps import map_png, overlay_png
from raydetect.sinks.parquet import ResultsSink
from raydetect.sinks.scored_chunk import ScoredChunk
from raydetect.views.placement import in_whole
from raydetect.views.windows import Input

OVERLAY_MAX_PX = 1024
NAMED_CATEGORIES = 8  # limits the length of `error` in every row


@dataclass(slots=True)
class ChunkResult:
    """Results of a chunk: rows in member order, heatmap PNG bytes by position, and clipped pixels of maps.

    `close_ups` has the PNG bytes of close-ups by position, in the order of the regions.
    """

    rows: list[Row]
    pictures: dict[int, bytes]
    clipped_pixels: int = 0
    close_ups: dict[int, list[bytes]] = field(default_factory=dict)


@dataclass(slots=True)
class _Work:
    """State of a chunk while it is scored: headers, and the columns of rows that scoring fills in, by position."""

    chunk: Chunk
    wanted: tuple[Heatmaps, ...]
    refs: dict[int, ArtifactRef] = field(default_factory=dict)
    headers: dict[int, Pixels] = field(default_factory=dict)
    outcomes: dict[int, dict[str, Any]] = field(default_factory=dict)
    result: ChunkResult = field(default_factory=lambda: ChunkResult([], {}))


class Scorer:
    """Scores chunks with one artifact or a fleet.

    Several threads may score chunks at the same time, and should: each decodes on the scorer's pool of threads and
    sends its batches to the one queue of the device, so the device works on one chunk while others are decoded or
    drawn. The number of threads bounds the chunks in memory.
    """

    def __init__(
        self, source: DetectorSource, spec: ScoreSpec, queue: DeviceQueue | None = None, online: bool = False
    ) -> None:
        """Loads the detector at once if there is only one, and the detectors of a fleet on demand.

        Args:
            source: a loaded artifact, or the stored artifacts of an index.
            spec: the job's source, sink, flag, batch size and resources.
            queue: the device, which other scorers may share; None = a queue of its own on the CPU.
            online: whether batches of this scorer go before those of others that share the device.

        Raises:
            ArtifactError, SpecError: the artifact cannot be loaded or does not fit `flag`.
        """
        self.index = source.index
        self.spec = spec
        queue = queue or DeviceQueue("cpu")
        self.detectors = DetectorCache(
            source, spec.flag, queue, spec.resources.detectors_in_memory, spec.sink.max_regions
        )
        self.rules = DecodeRules.of(spec.source)
        self._submit = queue.online if online else queue.bulk
        self._decoding = DecodePool(spec.resources.cpus_per_worker)

    def score_chunk(self, chunk: Chunk, wanted: Sequence[Heatmaps] = ()) -> ChunkResult:
        """Scores a chunk.

        Args:
            chunk: encoded images.
            wanted: heatmap setting of each image; empty = that of the spec.

        Raises:
            ArtifactError: the detector of a category cannot be loaded.
            BadMemberError: an image is bad and the source has `on_bad_member: fail`.
        """
        work = _Work(chunk, tuple(wanted) or (self.spec.sink.heatmaps,) * len(chunk.members))
        for positions in self._groups(work):
            self._score_group(positions, work)
        for position, member in enumerate(chunk.members):
            header = work.headers.get(position) or self._undecoded(member)
            outcome = work.outcomes.get(position) or self._bad_outcome(header)
            work.result.rows.append(self._row(member, chunk, header, outcome))
        return work.result

    def _groups(self, work: "_Work") -> list[list[int]]:
        """Positions of readable images by the detector that scores them, sorted by detector; notes their artifacts."""
        groups: dict[ArtifactRef, list[int]] = {}
        for position, member in enumerate(work.chunk.members):
            ref = self.index.for_category(member.category)
            if ref is not None and member.status == OK:
                work.refs[position] = ref
                groups.setdefault(self.index.detector_of(ref), []).append(position)
        return [positions for _, positions in sorted(groups.items())]

    def _score_group(self, positions: list[int], work: "_Work") -> None:
        """Scores the images of one detector."""

        def score(loaded: Mapping[ArtifactRef, LoadedDetector]) -> None:
            for scored in self._chosen(self._scored(loaded, positions, work), loaded, work):
                self._draw(scored, loaded[work.refs[scored.position]], work)

        self.detectors.use_all(sorted({work.refs[position] for position in positions}), score)

    def _scored(
        self, by_ref: Mapping[ArtifactRef, LoadedDetector], positions: list[int], work: "_Work"
    ) -> Iterator[Scored]:
        """Scores the images at `positions`; stores their headers in `work`."""
        loaded = next(iter(by_ref.values()))
        members = [work.chunk.members[position] for position in positions]
        decoded = decode_stream(members, self.rules, loaded.preprocess, self._decoding)
        noted = _note(decoded, positions, work.headers)
        for item in score_batches(loaded.detector, noted, self.spec.batch_size, self._submit):
            yield replace(item, position=positions[item.position])

    def _chosen(
        self, scored: Iterable[Scored], by_ref: Mapping[ArtifactRef, LoadedDetector], work: "_Work"
    ) -> Iterator[Scored]:
        """Notes the outcome of every image and yields the images that get a heatmap.

        A map leaves the device only for regions or a heatmap. `top_k` compares images of one artifact only, since raw
        scores of different detectors are not comparable.
        """
        best: dict[ArtifactRef, list[tuple[float, int, Scored]]] = {ref: [] for ref in by_ref}
        for item in scored:
            ref = work.refs[item.position]
            loaded = by_ref[ref]
            work.outcomes[item.position] = _outcome(item, loaded, work.chunk.members[item.position])
            if not item.is_finite:
                continue
            heatmaps = work.wanted[item.position]
            may_flag = loaded.decision.may_flag(item.image_score)
            if may_flag and loaded.region_threshold is not None:
                item = item.on_host()
                work.outcomes[item.position] |= self._located(item, loaded.region_threshold)
            if heatmaps == "all" or (heatmaps == "flagged" and may_flag):
                yield item
            elif heatmaps == "top_k":
                heapq.heappush(best[ref], (item.image_score, -item.position, item))
                if len(best[ref]) > self.spec.sink.top_k:
                    heapq.heappop(best[ref])
        kept = (item for entries in best.values() for _, _, item in entries)
        yield from sorted(kept, key=lambda item: item.position)

    def _located(self, item: Scored, threshold: float) -> dict[str, Any]:
        """The columns that say where an image is anomalous."""
        regions, left_out = find_regions(item.anomaly_map(), item.layout, threshold, self.spec.sink.max_regions)
        return {"regions": regions, "regions_left_out": left_out}

    def _undecoded(self, member: Member) -> Pixels:
        """Why a member was not decoded: it could not be read, or there is no detector for its category."""
        if member.status != OK:
            return Pixels(status=member.status, error=member.error, notes=member.notes)
        error = f"{member.key}: {self._unknown(member.category)}"
        return Pixels(status="unknown_category", error=error, notes=member.notes)

    def _unknown(self, category: str | None) -> str:
        if category is None:
            return "has no category, which a fleet needs. Set it with source.pattern, a sidecar or a column."
        known = list(self.index.categories)
        near = nearest(category, known)
        if len(known) > NAMED_CATEGORIES:
            near = f"{near.partition(' Known:')[0]} It has {len(known):,} others."
        return f"the fleet has no detector for category {category!r}.{near}"

    def _bad_outcome(self, header: Pixels) -> dict[str, Any]:
        refuse_bad_member(header.status, header.error, self.spec.source)
        return {"status": header.status, "error": header.error}

    def _row(self, member: Member, chunk: Chunk, header: Pixels, outcome: dict[str, Any]) -> Row:
        ref = self.index.for_category(member.category)
        return Row(
            key=member.key,
            image_uri=member.image_uri,
            chunk=chunk.id,
            artifact=ref.digest if ref is not None else self.index.digest,
            label=member.label,
            category=member.category,
            defect=member.defect,
            mask_uri=member.mask_uri,
            meta=member.meta,
            **outcome,
            **header.facts(),
        )

    def _draw(self, item: Scored, loaded: LoadedDetector, work: "_Work") -> None:
        if self.spec.sink.style == "map":
            whole_HW = in_whole(item.anomaly_map(), item.layout)
            picture, clipped = map_png(whole_HW, loaded.map_low, loaded.map_high)
            work.result.clipped_pixels += clipped
        else:
            data, regions = work.chunk.members[item.position].data, self._close_up_regions(item, work)
            places = close_up_places(regions, item.layout.picture)
            image, parts = decode_and_cut(data, self.rules, OVERLAY_MAX_PX, places, loaded.preprocess.view.spec)
            if parts:
                shown = zip(parts, places, regions, strict=False)  # the last regions may have none
                work.result.close_ups[item.position] = [close_up_png(*one) for one in shown]
            box = item.layout.box_on(image.size)
            picture = overlay_png(np.asarray(image), item.anomaly_map(), loaded.map_low, loaded.map_high, box)
        work.result.pictures[item.position] = picture

    def _close_up_regions(self, item: Scored, work: "_Work") -> tuple[AnomalousRegion, ...]:
        """The regions that get a close-up: those of a picture that its overlay shows reduced."""
        if not self.spec.sink.close_ups or max(item.layout.picture) <= OVERLAY_MAX_PX:
            return ()
        regions: tuple[AnomalousRegion, ...] = work.outcomes[item.position].get("regions", ())
        return regions


def _outcome(item: Scored, loaded: LoadedDetector, member: Member) -> dict[str, Any]:
    """The columns of a row that scoring fills in."""
    if not item.is_finite:
        message = f"{member.key}: the detector returned a score or map that is not finite. Report the image."
        return {"status": "not_finite", "error": message}
    p_value, flagged = loaded.decision.of(item.image_score)
    return {
        "status": OK,
        "image_score": item.image_score,
        "p_value": p_value,
        "threshold": loaded.decision.threshold,
        "flagged": flagged,
    }


def _note(
    decoded: Iterable[Input | Pixels], positions: list[int], headers: dict[int, Pixels]
) -> Iterator[Input | Pixels]:
    """Yields what is decoded unchanged and stores every image's `Pixels` in `headers`."""
    remaining = iter(positions)
    for item in decoded:
        if isinstance(item, Pixels):
            headers[next(remaining)] = item
        yield item


def score_and_write(scorer: Scorer, sink: ResultsSink, chunk: Chunk) -> ScoredChunk:
    """Scores a chunk and writes its heatmaps if they are large.

    Raises:
        ArtifactError, BadMemberError: see `Scorer.score_chunk`.
        StorageError: the heatmaps cannot be written.
    """
    started = time.perf_counter()
    result = scorer.score_chunk(chunk)
    scored = sink.write(chunk, result.rows, result.pictures, result.clipped_pixels, result.close_ups)
    facts = replace(scored.facts, seconds=round(time.perf_counter() - started, 3), host=socket.gethostname())
    return replace(scored, facts=facts)
