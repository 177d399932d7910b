"""Randomness as a function of (seed, what is drawn, index), never of history or of world size.

Every random number of the project comes from a generator made here. A resumed run, another number of
processes and another batch size therefore draw the same numbers.
"""

import hashlib

import numpy as np
import torch

_TWISTER = slice(3, 3 + 624)
"""The words of the Mersenne Twister in the state of PyTorch's CPU generator, as 64-bit integers."""


def derive_seed(*what: int | str) -> int:
    """A 63-bit seed from a path such as `(seed, "mae/init")`, for what takes a seed and no generator.

    PyTorch's CPU generator keeps 32 bits of a seed, which is too few for one per sample: among 50 000
    samples, a pair would share its noise for every fourth seed.
    """
    return int.from_bytes(_digest(what, 8), "little") >> 1


def torch_generator(*what: int | str) -> torch.Generator:
    """A fresh `torch.Generator` on the CPU for one thing that is drawn, such as `(seed, "fid/noise", index)`.

    All 19 968 bits of its state come from a hash of the path, so no two things share their numbers.
    """
    generator = torch.Generator()
    state = generator.get_state()  # uint8: seed, position, words, cached normals
    words = np.frombuffer(_digest(what, 4 * 624), "<u4").astype(np.int64)
    state.view(torch.int64)[_TWISTER] = torch.from_numpy(words)
    return generator.set_state(state)


def device_generator(device: torch.device, *what: int | str) -> torch.Generator:
    """`torch_generator` on a device; a GPU draws other numbers than a CPU, from a seed of 63 bits."""
    if device.type == "cpu":
        return torch_generator(*what)
    return torch.Generator(device).manual_seed(derive_seed(*what))


def numpy_generator(*what: int | str) -> np.random.Generator:
    """A fresh NumPy generator for one thing that is drawn, such as `(seed, "encode/crop", index)`."""
    return np.random.default_rng(int.from_bytes(_digest(what, 16), "little"))


def _digest(what: tuple[int | str, ...], size: int) -> bytes:
    """`size` bytes of a hash of a path: `("a", 1)` and `("a1",)` differ, NumPy's integers equal Python's."""
    path = tuple(part if isinstance(part, str) else int(part) for part in what)
    return hashlib.shake_256(repr(path).encode()).digest(size)
