"""The mean over images of their rows: bit-identical for any number of workers, as integer sums know no order.

Shapes: R rows of one image, D dims.
"""

import math

import torch
from torch import Tensor

from raydetect.blocks.coresets.keyed_rows import KeyedRows

VALUE_BITS = 40  # of the largest value; more than the 24 that float32 has
SUM_BITS = 62


def mean_rows(rows: KeyedRows, per_image: int) -> Tensor:
    """Mean over the images of all workers, row by row, (R, D) float64.

    A collective call. Values are rounded to 2 ** -40 of the largest, itself rounded up to a power of two; above 2 ** 22
    images, to one bit less for every doubling.

    Args:
        rows: at least one image on some worker.
        per_image: R, the same for all images.
    """
    images = rows.total() // per_image
    bits = min(VALUE_BITS, SUM_BITS - math.ceil(math.log2(images)))
    largest = float(rows.group.max(torch.tensor([rows.largest], dtype=torch.float64))[0])
    unit = 2.0 ** (math.ceil(math.log2(largest)) - bits) if largest else 1.0
    total_RD = torch.zeros(per_image, rows.store.dims, dtype=torch.int64)
    for first, block_ND in rows.store.blocks():
        place_N = torch.arange(first, first + len(block_ND)) % per_image
        total_RD.index_add_(0, place_N, (block_ND.double() / unit).round().long())
    return rows.group.sum(total_RD).double() / images * unit
