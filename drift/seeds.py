"""Randomness as a function of (seed, what is drawn, index), never of history or of world size.

Every random number of the project comes from a generator made here, so that a resumed run, another
number of processes or another batch size draws the same numbers.
"""

import hashlib

import numpy as np
import torch


def derive_seed(*what: int | str) -> int:
    """A 63-bit seed from a path such as `(seed, "drift/noise", step, slot)`.

    Two different paths give unrelated seeds: the path is hashed, with types and lengths in the hash,
    so that `("a", 1)` and `("a1",)` differ. NumPy's integers count as Python's.
    """
    path = tuple(part if isinstance(part, str) else int(part) for part in what)
    digest = hashlib.blake2b(repr(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(*what: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh `torch.Generator` for one thing that is drawn, for example `(seed, "fid/noise", index)`."""
    return torch.Generator(device).manual_seed(derive_seed(*what))


def numpy_generator(*what: int | str) -> np.random.Generator:
    """A fresh NumPy generator for one thing that is drawn, for example `(seed, "encode/crop", index)`."""
    return np.random.default_rng(derive_seed(*what))
