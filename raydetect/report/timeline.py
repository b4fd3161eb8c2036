"""Counts over the shards of a run, in order, in a bounded number of spans."""

from dataclasses import dataclass, field

from raydetect.records import Receipt

MAX_SPANS = 96


@dataclass(slots=True)
class Span:
    """Counts over consecutive shards."""

    first: int
    last: int
    first_uri: str
    last_uri: str
    images: int = 0
    flagged: int = 0
    bad: int = 0

    def merge(self, later: "Span") -> None:
        """Merges the following span into this one."""
        self.last, self.last_uri = later.last, later.last_uri
        self.images += later.images
        self.flagged += later.flagged
        self.bad += later.bad


@dataclass(slots=True)
class Timeline:
    """Spans with an equal number of shards, which doubles when there are too many spans."""

    spans: list[Span] = field(default_factory=list)
    shards_each: int = 1
    _in_last: int = 0

    def add(self, receipt: Receipt) -> None:
        """Adds the next shard."""
        flagged = sum(part.flagged for part in receipt.parts)
        span = Span(
            receipt.shard, receipt.shard, receipt.uri, receipt.uri, receipt.rows, flagged, receipt.bad_rows
        )  # fmt: skip
        if self.spans and self._in_last < self.shards_each:
            self.spans[-1].merge(span)
            self._in_last += 1
            return
        if len(self.spans) == MAX_SPANS:
            self._double()
        self.spans.append(span)
        self._in_last = 1

    def _double(self) -> None:
        pairs = zip(self.spans[::2], self.spans[1::2], strict=True)
        merged = []
        for first, later in pairs:
            first.merge(later)
            merged.append(first)
        self.spans = merged
        self.shards_each *= 2
