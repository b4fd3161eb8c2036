"""Randomness keyed by (seed, purpose, image key), never by position, rank or call order."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

DRAWS = {Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_}


def _hash(seed: int, purpose: Sequence[str | int]) -> int:
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def keyed_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends only on `seed` and `purpose`."""
    return _hash(seed, purpose) >> 1


def keyed_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded by `seed` and `purpose`."""
    return torch.Generator().manual_seed(keyed_seed(seed, *purpose))


def keyed_unit(seed: int, *purpose: str | int) -> float:
    """A pseudo-random number in [0, 1), determined by `seed` and `purpose`."""
    return (_hash(seed, purpose) >> 11) / float(1 << 53)


def shuffled(keys: Sequence[str], seed: int, epoch: int) -> list[str]:
    """`keys` in the order of an epoch, independent of their input order."""
    return sorted(keys, key=lambda key: (_hash(seed, ("shuffle", epoch, key)), key))


def in_rounds(keys: Sequence[str], seed: int, *purpose: str | int) -> Iterator[str]:
    """Infinite stream of `keys` in rounds, each in a different order that depends only on `seed` and `purpose`.

    Raises:
        ValueError: `keys` is empty.
    """
    if not keys:
        raise ValueError("there are no keys to draw from")
    for number in count():
        yield from shuffled(keys, keyed_seed(seed, *purpose), number)


def mixed_hash(values_N: Tensor, seed: int | Tensor) -> Tensor:
    """Hash of 64-bit integers with wrap-around (finaliser of splitmix64, Steele et al. 2014).

    A tensor of seeds is broadcast with the values.
    """
    mixed_N = values_N ^ seed
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed_N = (mixed_N ^ ((mixed_N >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return mixed_N ^ ((mixed_N >> 31) & ((1 << 33) - 1))


class SkipInitialisation(TorchFunctionMode):
    """Skips random weight initialisation of networks built in the block; weights are undefined until loaded.

    Initialisation takes most of the time of building a network.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Skips draws; `torch.nn.init` passes the tensor by keyword, methods as the first argument."""
        kwargs = kwargs or {}
        return (args[0] if args else kwargs["tensor"]) if func in DRAWS else func(*args, **kwargs)
