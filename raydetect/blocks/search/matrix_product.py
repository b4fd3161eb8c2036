"""Float32 matrix products using the fastest available library.

Shapes: N patches, M rows, D dims.
"""

import torch
from torch import Tensor

# twice as fast as MKL, which torch.mm calls, on CPUs that MKL does not optimise for (AMD)
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SHAPES_PER_OCTAVE = 8
LEAST_ROWS = 16


def product(left_ND: Tensor, right_MD: Tensor, offset_M: Tensor | None = None) -> Tensor:
    """offset + left right^T, float32, (N, M); the summation order is unspecified.

    Note: oneDNN compiles a kernel for every new shape, in about 0.4 ms; see `padded_rows`.
    """
    if ONEDNN and left_ND.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(left_ND, right_MD, offset_M, "none", [], "")
    return left_ND @ right_MD.T if offset_M is None else torch.addmm(offset_M, left_ND, right_MD.T)


def padded_rows(count: int) -> int:
    """`count` rounded up, by at most an eighth from 128 on, to limit the number of distinct shapes and kernels."""
    step = max(LEAST_ROWS, (1 << count.bit_length()) // (2 * SHAPES_PER_OCTAVE))
    return -(-count // step) * step
