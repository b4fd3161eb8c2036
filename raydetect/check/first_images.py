"""What a fit would see of the first images of its source: whether they can be read by its view, and hints on it."""

from collections import Counter
from collections.abc import Callable

from raydetect.errors import SpecError
from raydetect.images.decode import decode_windows
from raydetect.images.opening import DecodeRules, header_size
from raydetect.images.preprocess import Preprocess
from raydetect.records import Member
from raydetect.views.hints import hints
from raydetect.views.windows import Input

MAX_IMAGES, MAX_BYTES = 1000, 128 << 20  # read of a source
TRIED = 8  # images that are decoded before a source counts as unreadable


class FirstImages:
    """The first images of a source, seen with the decoding rules of a fit."""

    def __init__(self, rules: DecodeRules, preprocess_of: Callable[[str | None], Preprocess]) -> None:
        """Starts without images.

        Args:
            rules: decoding rules of the source.
            preprocess_of: rules of the detector for images of a category.
        """
        self._rules, self._preprocess_of = rules, preprocess_of
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._errors: list[str] = []
        self._is_readable = False

    def note(self, member: Member) -> None:
        """Notes the size of an image, and decodes its first window until one could be read.

        Raises:
            SpecError: its category has no mask or picture to align to.
        """
        size = header_size(member.data, self._rules)
        self._sizes.update([size] if size else [])
        if self._is_readable or len(self._errors) == TRIED:
            return
        first = next(decode_windows(member, self._rules, self._preprocess_of(member.category)))
        if isinstance(first, Input):
            self._is_readable = True
        else:
            self._errors.append(first.error)

    def refuse_unreadable(self, setting: str) -> None:
        """Refuses a source whose first images cannot be read.

        Args:
            setting: that names the source, for the message.

        Raises:
            SpecError: none of them could be.
        """
        if self._errors and not self._is_readable:
            count = len(self._errors)
            which = f"none of the first {count} images" if count > 1 else "its first image"
            verb = "can" if count > 1 else "cannot"
            raise SpecError(f"{setting}: {which} {verb} be read; {self._errors[0]}")

    def hints(self) -> list[str]:
        """Hints on the view of images without a category."""
        preprocess = self._preprocess_of(None)
        return hints(self._sizes, preprocess.view, preprocess.image_size)
