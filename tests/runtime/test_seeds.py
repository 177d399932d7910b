"""Seeds depend on all that they are made of, and on nothing else; no two samples share their noise."""

import hashlib

import numpy as np
import pytest
import torch

from drift.runtime.seeds import derive_seed, numpy_generator, torch_generator


def draws(generator) -> bytes:
    if isinstance(generator, torch.Generator):
        return torch.randn(8, generator=generator).numpy().tobytes()
    return generator.standard_normal(8).tobytes()


@pytest.mark.parametrize("make", [torch_generator, numpy_generator])
def test_numbers_depend_on_every_part_of_the_path_and_on_nothing_else(make):
    paths = [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0, "a1"), (0, "a", "1"), ("0", "a", 1)]
    assert len({draws(make(*path)) for path in paths}) == len(paths)
    assert len({derive_seed(*path) for path in paths}) == len(paths)
    torch.randn(7)
    assert draws(make(0, "a", np.int64(3))) == draws(make(0, "a", 3))


def test_seeds_are_the_same_everywhere():
    # A fixed number: Python's own hash of a string changes from process to process
    assert derive_seed(0, "drift/noise", 5, 3) == 2089768458582362349


def test_the_whole_state_of_torchs_generator_is_the_hash_of_the_path():
    """NumPy's Mersenne Twister with the same 624 words gives the same numbers, so none is out of place."""
    words = np.frombuffer(hashlib.shake_256(b"(7, 'fid/sample', 12)").digest(4 * 624), "<u4")
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    expected = twister.random_raw(2000) % 2**24  # over three times the words
    found = torch.randint(2**24, (2000,), generator=torch_generator(7, "fid/sample", 12))
    assert np.array_equal(found.numpy(), expected.astype(np.int64))


def test_samples_whose_seeds_meet_in_torchs_32_bits_have_noise_of_their_own():
    seeds = np.array([derive_seed(0, "fid/sample", index) for index in range(200_000)]) % 2**32
    order = np.argsort(seeds)
    meet = np.flatnonzero(np.diff(seeds[order]) == 0)
    assert len(meet), "a birthday among so many: 4.7 pairs are to be expected"
    for pair in zip(order[meet], order[meet + 1], strict=True):
        assert len({draws(torch_generator(0, "fid/sample", index)) for index in pair}) == 2
