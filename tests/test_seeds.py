"""Seeds depend on all that they are made of, and on nothing else."""

import numpy as np
import torch

from drift.seeds import derive_seed, numpy_generator, torch_generator


def test_seeds_differ_where_any_part_differs():
    paths = [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0, "a1"), (0, "a", "1"), ("0", "a", 1)]
    seeds = [derive_seed(*path) for path in paths]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_the_same_everywhere():
    # A fixed number: Python's own hash of a string changes from process to process
    assert derive_seed(0, "drift/noise", 5, 3) == 4018198289464120896


def test_numpy_integers_count_as_numbers():
    assert derive_seed(0, "a", np.int64(3)) == derive_seed(0, "a", 3)


def test_generators_start_anew_each_time():
    torch.manual_seed(1)
    first = torch.randn(3, generator=torch_generator(0, "x"))
    torch.randn(7)
    assert torch.equal(first, torch.randn(3, generator=torch_generator(0, "x")))
    assert (numpy_generator(0, "x").random(3) == numpy_generator(0, "x").random(3)).all()
