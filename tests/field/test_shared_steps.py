"""Two processes with half of the classes each against one with all of them."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from field_inputs import draw, loss_and_grad, relative_error
from processes import in_processes

from drift.field import FieldSettings
from drift.field.guidance import Attraction

RANKS = 2
CASES = {
    "batch": FieldSettings(),
    "class": FieldSettings.sinkhorn(),
    "batch-split-sinkhorn": FieldSettings(coupling="sinkhorn", drift_form="split", negatives="second_batch"),
    "class-joint-sinkhorn": FieldSettings.sinkhorn(coupling="sinkhorn"),
    "batch-raw": replace(FieldSettings(), normalize_drift_theta=False, drift_tau_scale=True),
    "class-unit_scale": FieldSettings.sinkhorn(unit_scale=True),
}


def inputs():
    return draw(classes=2 * RANKS)  # classes of different scales


def compute_share(ranks, folder):
    def all_reduce(sums):
        dist.all_reduce(sums)
        return sums

    results = {}
    share = [t.tensor_split(RANKS)[ranks.rank] for t in inputs()]
    for name, knobs in CASES.items():
        results[name] = loss_and_grad(*share, knobs, reduce=all_reduce)
    torch.save(results, folder / f"{ranks.rank}.pt")


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """What each rank has computed."""
    folder = tmp_path_factory.mktemp("ranks")
    assert in_processes(compute_share, RANKS, folder) == [0] * RANKS
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name_of_case", CASES)
def test_ranks_equal_one_process(shares, name_of_case):
    loss, grad, statistics = loss_and_grad(*inputs(), CASES[name_of_case])
    losses, grads, shared = zip(*(share[name_of_case] for share in shares), strict=True)
    assert float(losses[0]) != pytest.approx(float(losses[1]), rel=1e-2)  # each its own mean
    torch.testing.assert_close(sum(losses) / RANKS, loss)
    assert relative_error(torch.cat(grads) / RANKS, grad) < 1e-5
    for name in ("loss", *Attraction._fields):
        torch.testing.assert_close(sum(s[name] for s in shared) / RANKS, statistics[name])
    if CASES[name_of_case].normalization_scope == "batch":
        for of_rank in shared:
            for name in ("scale", "drift_rms"):
                torch.testing.assert_close(of_rank[name], statistics[name])
