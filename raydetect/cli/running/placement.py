"""Where a job runs if the person does not say: small sources in this process, others on a Ray on this machine."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from raydetect.errors import SpecError

if TYPE_CHECKING:
    from raydetect.config import ResourceSpec
    from raydetect.records import Shard

SMALL_IMAGES = 2_000  # loose images, or cells times images: about as long as a Ray with one worker takes to start
SMALL_BYTES = 512 << 20
LOCAL_RAY = "local"  # as an address

ray = click.option("--ray", "on_ray", is_flag=True, help="Start a local Ray, also for a small source.")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the person said about where a job runs.

    Attributes:
        address: cluster address of `--address`, or None.
        in_process: `--local`.
        on_ray: `--ray`.
    """

    address: str | None
    in_process: bool
    on_ray: bool

    def __post_init__(self) -> None:
        """Refuses contradictions.

        Raises:
            SpecError: `--ray` with `--local` or `--address`.
        """
        if self.on_ray and (self.in_process or self.address):
            other = "--local runs the job in this process" if self.in_process else "--address names a cluster"
            raise SpecError(f"--ray starts a Ray on this machine, and {other}. Give one of them.")

    @property
    def is_open(self) -> bool:
        """Whether it is for the size of the source to decide."""
        return not (self.in_process or self.on_ray or self.address or os.environ.get("RAY_ADDRESS"))

    @property
    def target(self) -> str | None:
        """The address for `session`: of `--address`, or `local` with `--ray`, whatever RAY_ADDRESS is."""
        return LOCAL_RAY if self.on_ray else self.address


@dataclass(frozen=True, slots=True)
class Size:
    """How large a source is.

    Attributes:
        images: number of images; None if they are in containers and not counted.
        bytes: encoded size.
    """

    images: int | None
    bytes: int

    @classmethod
    def of(cls, shards: Iterable["Shard"]) -> "Size":
        """Adds up shards; reads nothing."""
        from raydetect.archives.formats.loose_files import loose_names

        listed = list(shards)
        is_loose = all(shard.format == "prefix" for shard in listed)
        images = sum(len(loose_names(shard)) for shard in listed) if is_loose else None
        return cls(images, sum(shard.size_bytes for shard in listed))

    @property
    def is_small(self) -> bool:
        """Whether one process is done before a Ray on this machine has done much."""
        return (self.images or 0) <= SMALL_IMAGES and self.bytes <= SMALL_BYTES

    def text(self) -> str:
        """`40 image files`, or the bytes if the images are not counted."""
        from raydetect.progress.texts import bytes_text

        if self.images is None:
            return bytes_text(self.bytes)
        return f"{self.images:,} image file{'' if self.images == 1 else 's'}"


def runs_here(wanted: Wanted, resources: "ResourceSpec", size: "Any") -> bool:
    """Decides whether a job runs in this process, and says why if the person left it open.

    Args:
        wanted: what the person said.
        resources: of the job.
        size: called for the `Size` of the source if it matters, since listing one takes time.
    """
    if not wanted.is_open:
        return wanted.in_process
    if resources.num_actors > 1:
        return _says(False, f"{resources.num_actors} workers")
    found: Size = size()
    return _says(found.is_small, found.text())


def runs_cells_here(wanted: Wanted, cells: int) -> bool:
    """Decides whether the cells of an evaluation run in this process: a single one, as Ray runs several at a time."""
    if not wanted.is_open or not cells:
        return wanted.in_process
    return _says(cells == 1, f"{cells:,} cell{'' if cells == 1 else 's'}")


def _says(here: bool, why: str) -> bool:
    where = "in this process" if here else "on a local Ray"
    other = "--ray starts a local Ray" if here else "--local runs in this process"
    click.echo(f"Runs {where} ({why}); {other}.", err=True)
    return here
