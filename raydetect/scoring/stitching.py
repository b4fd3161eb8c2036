"""Puts the scores and anomaly maps of a picture's windows together (the rules are stated in `views/view.py`)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from raydetect.views.view import Layout, Window


class Stitched:
    """The results of one picture.

    Attributes:
        layout: its windows.
        score: the highest image score of its windows so far.
        is_finite: whether all scores and maps so far are finite.
        waiting: windows that are being scored.
        has_all: whether no further windows follow.
    """

    def __init__(self, layout: Layout) -> None:
        """Begins a picture; its map stays on the detector's device."""
        self.layout, self.score, self.is_finite = layout, -math.inf, True
        self.waiting, self.has_all = 0, False
        self._map_HW: Tensor | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all windows are scored."""
        return self.has_all and not self.waiting

    def add(self, window: Window, score: float, is_finite: bool, map_HW: Tensor) -> None:
        """Adds the result of a window; `map_HW` has the size of the input."""
        self.waiting -= 1
        self.score = max(self.score, score)
        self.is_finite = self.is_finite and is_finite
        left, upper, right, lower = window.place
        is_whole = (left, upper) == (0, 0) and (lower, right) == tuple(map_HW.shape)
        placed_HW = map_HW if is_whole else map_HW[upper:lower, left:right]
        if len(self.layout.windows) == 1 and self.layout.canvas == tuple(placed_HW.shape):
            self._map_HW = placed_HW
            return
        if self._map_HW is None:
            self._map_HW = torch.full(self.layout.canvas, math.nan, device=map_HW.device)
        shown = window.on_canvas(self.layout.reduction)
        self._map_HW[shown] = torch.fmax(self._map_HW[shown], self._on_canvas(window, placed_HW))

    def anomaly_map(self) -> Tensor:
        """The map of the picture, float32 (H, W) of the layout's canvas; NaN where it is not looked at."""
        assert self._map_HW is not None
        looked_HW = self.layout.looked
        if looked_HW is None:
            return self._map_HW
        looked = torch.from_numpy(looked_HW.copy()).to(self._map_HW.device)
        return torch.where(looked, self._map_HW, math.nan)

    def _on_canvas(self, window: Window, placed_HW: Tensor) -> Tensor:
        """The part of a window's map that its cell shows; of a reduced canvas, the highest of each block of px there.

        A block that lies in several cells gets the highest of all of them.
        """
        size = (window.size[1], window.size[0])
        if tuple(placed_HW.shape) != size:
            placed_HW = F.interpolate(placed_HW[None, None].float(), size, mode="bilinear")[0, 0]
        step = self.layout.reduction
        left, upper, right, lower = window.cell
        x, y = window.origin
        part_HW = placed_HW[upper - y : lower - y, left - x : right - x].float()
        if step == 1:
            return part_HW
        padded_HW = F.pad(part_HW, (left % step, 0, upper % step, 0), value=-math.inf)
        return F.max_pool2d(padded_HW[None, None], step, ceil_mode=True)[0, 0]
