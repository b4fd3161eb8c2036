"""Randomness keyed by words (seed, purpose, image key), never by position, rank or call order."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

DRAWS = {Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_}


def _hash(seed: int, words: Sequence[str | int]) -> int:
    text = "\x1f".join([str(seed), *map(str, words)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def keyed_seed(seed: int, *words: str | int) -> int:
    """A 63-bit seed that is a function of `seed` and `words` alone."""
    return _hash(seed, words) >> 1


def keyed_generator(seed: int, *words: str | int) -> torch.Generator:
    """A CPU generator seeded by `seed` and `words`."""
    return torch.Generator().manual_seed(keyed_seed(seed, *words))


def keyed_unit(seed: int, *words: str | int) -> float:
    """A number in [0, 1), uniform over `words`."""
    return (_hash(seed, words) >> 11) / float(1 << 53)


def shuffled(keys: Sequence[str], seed: int, epoch: int) -> list[str]:
    """`keys` in the order of one epoch; does not depend on the order they come in."""
    return sorted(keys, key=lambda key: (_hash(seed, ("shuffle", epoch, key)), key))


def in_rounds(keys: Sequence[str], seed: int, *words: str | int) -> Iterator[str]:
    """`keys` without end, every round of them in an order of its own; keyed by `seed` and `words` alone.

    Raises:
        ValueError: there is no key.
    """
    if not keys:
        raise ValueError("there are no keys to draw from")
    for number in count():
        yield from shuffled(keys, keyed_seed(seed, *words), number)


def mixed_hash(values_N: Tensor, seed: int) -> Tensor:
    """A hash of 64-bit integers (the finaliser of splitmix64, Steele et al. 2014), wrapping around."""
    mixed_N = values_N ^ seed
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed_N = (mixed_N ^ ((mixed_N >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return mixed_N ^ ((mixed_N >> 31) & ((1 << 33) - 1))


class Undrawn(TorchFunctionMode):
    """Networks that are built in the block get no random weights: whatever memory held, until they are loaded.

    Drawing them takes most of the time of building a network.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Passes over draws; `torch.nn.init` names its tensor, methods have it first."""
        kwargs = kwargs or {}
        return (args[0] if args else kwargs["tensor"]) if func in DRAWS else func(*args, **kwargs)
