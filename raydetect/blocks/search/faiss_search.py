"""Searches with faiss on CPUs: flat (exact) and IVF-PQ (approximate).

Shapes: N patches, M bank rows, D feature dim, K neighbours, C candidates.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydetect.blocks.search.exact_search import Candidates, ExactSearch, Proposer, least_distance
from raydetect.blocks.search.neighbors import BankSearch
from raydetect.blocks.search.search import Search, as_bank, rerank_exactly, settled_distance
from raydetect.errors import ArtifactError, SpecError

POINTS_PER_CENTROID = 39  # faiss's recommended minimum for k-means
MOST_BITS = 8
LEAST_BITS = 4
LEAST_ROWS = POINTS_PER_CENTROID << LEAST_BITS
DIMS_PER_CODE = 8
PROBED_SHARE = 8  # one in this many lists is probed
REFINED = 64  # candidates per patch refined by true distance
BANK_INDEX = "bank_index"


def require_faiss() -> Any:
    """The faiss module.

    Raises:
        SpecError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise SpecError(
            "search: this search requires faiss, which is not installed. Run `pip install 'raydetect[cpu]'`, "
            "or set it to exact or bfloat16."
        ) from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def as_numpy(rows_ND: Tensor) -> np.ndarray:
    """Float32 rows in the format faiss expects."""
    return np.ascontiguousarray(rows_ND.detach().cpu().float().numpy())


class FaissSearch(ExactSearch):
    """Candidates from `IndexFlatL2`, refined by exact differences; bit-identical to `BankSearch`.

    The bank stays on the CPU; answers are returned on the patches' device.
    """

    def __init__(self, bank_MD: Tensor) -> None:
        """Copies the bank into an index.

        Raises:
            SpecError: faiss is not installed.
            ValueError: the bank is empty or not two-dimensional.
        """
        super().__init__(bank_MD.cpu())
        self.index = require_faiss().IndexFlatL2(self.dims)
        self.index.add(as_numpy(self.bank_MD - self.mean_D))

    def to(self, device: torch.device) -> "FaissSearch":
        """Returns itself; it accepts patches on any device."""
        return self

    def nearest(self, patches_ND: Tensor, num_neighbors: int = 1) -> tuple[Tensor, Tensor]:
        """The K nearest rows, on the device of the patches."""
        distance_NK, index_NK = super().nearest(patches_ND.cpu(), num_neighbors)
        return distance_NK.to(patches_ND.device), index_NK.to(patches_ND.device)

    def rows(self, index_X: Tensor) -> Tensor:
        """Rows by index, on the device of the indices."""
        return self.bank_MD[index_X.cpu()].to(index_X.device)

    def proposers(self, num_neighbors: int) -> list[Proposer]:
        """faiss only."""
        return [self._propose]

    def _propose(self, centred_ND: Tensor, num_neighbors: int) -> Candidates:
        require_faiss()  # sets the number of threads
        count = min(num_neighbors + 1, self.num_rows)
        approx_NC, index_NC = map(torch.from_numpy, self.index.search(as_numpy(centred_ND), count))
        worst_N = approx_NC[:, -1] if count < self.num_rows else torch.full((len(index_NC),), torch.inf)
        least_N = least_distance(worst_N, torch.linalg.vector_norm(centred_ND, dim=1), self.share)
        # faiss returns -1 for missing results (non-finite features); such answers are never proven
        return Candidates(index_NC.clamp_min(0), least_N)


class IvfPqSearch(Search):
    """Inverted lists with product quantisation: approximate, at a fraction of the cost of an exact search.

    Parameters derive from the bank: nlist = 4 sqrt(M), with at least 39 rows per list; D / 8 codes, or the next smaller
    divisor of D, of 8 bits, or fewer to have 39 rows per centroid; one in eight lists is probed; the best 64 rows by
    code are refined by true distance. So a distance is that of the returned row, never below the true minimum.
    """

    exact = False

    def __init__(self, bank_MD: Tensor, seed: int = 0, stored: Tensor | None = None) -> None:
        """Trains an index, or restores a stored one.

        Args:
            bank_MD: float32.
            seed: seed of the k-means.
            stored: the tensor returned by `tensors`, uint8.

        Raises:
            SpecError: faiss is not installed, or the bank is too small to train on.
            ArtifactError: the stored index does not belong to this bank.
        """
        self.bank_MD = as_bank(bank_MD).cpu()
        self.mean_D = self.bank_MD.double().mean(0).float()
        self.index = self._train(seed) if stored is None else self._restore(stored)

    def _train(self, seed: int) -> Any:
        faiss = require_faiss()
        rows, dims = self.bank_MD.shape
        if rows < LEAST_ROWS:
            raise SpecError(f"search: ivfpq needs a bank of {LEAST_ROWS} rows, this one has {rows}. Set it to exact.")
        lists = max(1, min(round(4 * math.sqrt(rows)), rows // POINTS_PER_CENTROID))
        codes = next(m for m in range(max(1, dims // DIMS_PER_CODE), 0, -1) if dims % m == 0)
        bits = min(MOST_BITS, (rows // POINTS_PER_CENTROID).bit_length() - 1)
        index = faiss.IndexIVFPQ(faiss.IndexFlatL2(dims), dims, lists, codes, bits)
        index.cp.seed = index.pq.cp.seed = seed % (1 << 31)
        index.nprobe = -(-lists // PROBED_SHARE)
        centred = as_numpy(self.bank_MD - self.mean_D)
        index.train(centred)
        index.add(centred)
        return index

    def _restore(self, stored: Tensor) -> Any:
        faiss = require_faiss()
        try:
            index = faiss.deserialize_index(stored.cpu().numpy())
        except RuntimeError as error:
            raise ArtifactError(f"the artifact's {BANK_INDEX!r} is not a faiss index ({error}). Fit again.") from None
        if not isinstance(index, faiss.IndexIVFPQ) or (index.ntotal, index.d) != tuple(self.bank_MD.shape):
            raise ArtifactError(f"the artifact's {BANK_INDEX!r} is not an IVF-PQ index of its bank. Fit again.")
        return index

    @property
    def num_rows(self) -> int:
        """M."""
        return self.bank_MD.shape[0]

    @property
    def dims(self) -> int:
        """D."""
        return self.bank_MD.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The serialised index."""
        return {BANK_INDEX: torch.from_numpy(require_faiss().serialize_index(self.index))}

    def nearest(self, patches_ND: Tensor, num_neighbors: int = 1) -> tuple[Tensor, Tensor]:
        """K near rows, on the device of the patches; row 0 is a placeholder if the probed lists hold fewer than K."""
        self.check(patches_ND, num_neighbors)
        require_faiss()  # sets the number of threads
        own_ND = patches_ND.cpu().float()
        count = min(max(REFINED, num_neighbors), self.num_rows)
        _, index_NC = self.index.search(as_numpy(own_ND - self.mean_D), count)
        index = torch.from_numpy(index_NC)
        parts = zip(own_ND.split(1024), index.split(1024), strict=True)
        answers = [self._refine(patches, rows, num_neighbors) for patches, rows in parts]
        distance_NK, index_NK = (torch.cat(part) for part in zip(*answers, strict=True))
        return distance_NK.to(patches_ND.device), index_NK.to(patches_ND.device)

    def _refine(self, patches_ND: Tensor, index_NC: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
        """The K best candidates by true distance; patches whose lists held fewer than K are searched exhaustively."""
        index_NC = index_NC.sort(dim=1).values
        distance_NC = settled_distance(self.bank_MD[index_NC.clamp_min(0)], patches_ND[:, None])
        distance_NC, order_NC = distance_NC.masked_fill_(index_NC < 0, torch.inf).sort(dim=1, stable=True)
        distance_NK, index_NK = distance_NC[:, :num_neighbors], index_NC.gather(1, order_NC)[:, :num_neighbors]
        short_N = index_NK[:, -1] < 0
        if short_N.any():
            part_ND = patches_ND[short_N]
            _, found = require_faiss().knn(as_numpy(part_ND), as_numpy(self.bank_MD), num_neighbors)
            distance_NK[short_N], index_NK[short_N] = rerank_exactly(
                self.bank_MD, part_ND, torch.from_numpy(found).clamp_min(0), num_neighbors
            )
        return distance_NK, index_NK

    def rows(self, index_X: Tensor) -> Tensor:
        """Rows by index, on the device of the indices."""
        return self.bank_MD[index_X.cpu()].to(index_X.device)

    def to(self, device: torch.device) -> "IvfPqSearch":
        """Returns itself; it accepts patches on any device."""
        return self


def recall_at_1(search: Search, bank_MD: Tensor, patches_ND: Tensor) -> float:
    """Share of patches for which `search` finds a row as near as the true nearest, in [0, 1]."""
    found_N1, exact_N1 = search.nearest(patches_ND)[0], BankSearch(bank_MD).nearest(patches_ND)[0]
    return float((found_N1 <= exact_N1.to(found_N1.device)).double().mean())
