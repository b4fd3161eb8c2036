"""Limits the file names of a container, all of which are in memory before the first file is read."""

from raydetect.errors import ArchiveError

MAX_NAME_BYTES = 64 << 10  # length of one name, and of a header that contains it
MAX_NAMES_BYTES = 2 << 30  # memory for the names of one container: about three million files
FILE_BYTES = 600  # memory for a file, without its name
ROW_BYTES = 200  # memory for a row, without its name


class NameCount:
    """Counts the memory for the names of one container."""

    def __init__(self, uri: str) -> None:
        """Starts at zero; `uri` is for messages."""
        self.uri, self._bytes = uri, 0

    def add(self, num_bytes: int) -> None:
        """Adds a name.

        Args:
            num_bytes: memory for the name and its file or row.

        Raises:
            ArchiveError: the names need more than `MAX_NAMES_BYTES`.
        """
        self._bytes += num_bytes
        if self._bytes > MAX_NAMES_BYTES:
            raise ArchiveError(
                f"{self.uri}: the names in it need more than {MAX_NAMES_BYTES >> 20:,} MiB of memory. Pack fewer files "
                "into one container."
            )
