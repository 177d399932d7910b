"""Seeds depend on all that they are made of, and on nothing else; no two samples share their noise."""

import hashlib

import numpy as np
import torch

from drift.runtime.seeds import derive_seed, numpy_generator, torch_generator


def test_seeds_differ_where_any_part_differs():
    paths = [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0, "a1"), (0, "a", "1"), ("0", "a", 1)]
    seeds = [derive_seed(*path) for path in paths]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    for made in (torch_generator, numpy_generator):
        first = [draws(made(*path)) for path in paths]
        assert len(set(first)) == len(paths)


def draws(generator) -> bytes:
    if isinstance(generator, torch.Generator):
        return torch.randn(8, generator=generator).numpy().tobytes()
    return generator.standard_normal(8).tobytes()


def test_seeds_are_the_same_everywhere():
    # A fixed number: Python's own hash of a string changes from process to process
    assert derive_seed(0, "drift/noise", 5, 3) == 2089768458582362349


def test_numpy_integers_count_as_numbers():
    assert derive_seed(0, "a", np.int64(3)) == derive_seed(0, "a", 3)
    assert draws(torch_generator(0, "a", np.int64(3))) == draws(torch_generator(0, "a", 3))


def test_generators_start_anew_each_time():
    torch.manual_seed(1)
    first = torch.randn(3, generator=torch_generator(0, "x"))
    torch.randn(7)
    assert torch.equal(first, torch.randn(3, generator=torch_generator(0, "x")))
    assert (numpy_generator(0, "x").random(3) == numpy_generator(0, "x").random(3)).all()


def test_the_whole_state_of_torchs_generator_is_the_hash_of_the_path():
    """NumPy's Mersenne Twister with the same 624 words gives the same numbers, so none is out of place."""
    words = np.frombuffer(hashlib.shake_256(b"(7, 'fid/sample', 12)").digest(4 * 624), "<u4")
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    expected = twister.random_raw(2000) % 2**24  # over three times the words
    generator = torch_generator(7, "fid/sample", 12)
    found = torch.randint(2**24, (2000,), generator=generator)
    assert np.array_equal(found.numpy(), expected.astype(np.int64))


def test_samples_whose_seeds_meet_in_torchs_32_bits_have_noise_of_their_own():
    seeds = np.array([derive_seed(0, "fid/sample", index) for index in range(200_000)]) % 2**32
    order = np.argsort(seeds)
    meet = np.flatnonzero(np.diff(seeds[order]) == 0)
    assert len(meet), "a birthday among so many: 4.7 pairs are to be expected"
    for pair in zip(order[meet], order[meet + 1], strict=True):
        old = [draws(torch.Generator().manual_seed(derive_seed(0, "fid/sample", index))) for index in pair]
        new = [draws(torch_generator(0, "fid/sample", index)) for index in pair]
        assert old[0] == old[1]
        assert new[0] != new[1]


def test_no_two_of_a_million_samples_share_a_state():
    """By the first 128 bits of the state, which are those of a hash of any length."""
    state = torch_generator(0, "fid/sample", 5).get_state().view(torch.int64)[3:7].numpy()
    assert state.astype("<u4").tobytes() == hashlib.shake_256(b"(0, 'fid/sample', 5)").digest(16)
    heads = {hashlib.shake_256(b"(0, 'fid/sample', %d)" % index).digest(16) for index in range(1_000_000)}
    assert len(heads) == 1_000_000
