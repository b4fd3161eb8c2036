"""How many files a container may name: all of them are known before the first is read, so they are held in memory."""

from raydetect.errors import ArchiveError

MAX_NAME_BYTES = 64 << 10  # of one name, and of a header that holds it
MAX_NAMES_BYTES = 2 << 30  # that the names of one container may take in memory: about three million files
FILE_BYTES = 600  # that are held of a file beside its name
ROW_BYTES = 200  # likewise of a row


class NameCount:
    """What the names of one container take."""

    def __init__(self, uri: str) -> None:
        """Nothing yet."""
        self.uri, self._bytes = uri, 0

    def add(self, held_bytes: int) -> None:
        """One more name.

        Args:
            held_bytes: that it takes with what is known beside it.

        Raises:
            ArchiveError: they are too many.
        """
        self._bytes += held_bytes
        if self._bytes > MAX_NAMES_BYTES:
            raise ArchiveError(
                f"{self.uri}: the names in it need more than {MAX_NAMES_BYTES >> 20:,} MiB of memory. Pack fewer files "
                "into one container."
            )
