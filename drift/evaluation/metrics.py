"""Metrics beside the Fréchet distance, from features or class logits."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from drift.evaluation.store import BLOCK, FeatureStore
from drift.runtime.seeds import derive_seed, numpy_generator
from drift.runtime.torchvision import ensure_torchvision

SPLITS = 10  # of the Inception Score (Salimans et al. 2016)
NEIGHBOURS = 3  # k of precision and recall (Kynkäänniemi et al. 2019)
Features = FeatureStore | np.ndarray  # float32 [N, D]


def kernel_distance(reference: Features, generated: Features, seed: int) -> float:
    """KID of features `[N, D]` and `[M, D]`: clean-fid's function, with subsets drawn from `seed`.

    clean-fid draws them from NumPy's global generator, whose state is restored afterwards.
    """
    ensure_torchvision()
    from cleanfid import fid as cleanfid

    measure: Any = cleanfid.kernel_distance  # has no types, and reads either kind of features alike
    state = np.random.get_state()
    np.random.seed(derive_seed(seed, "fid/kid") % 2**32)
    try:
        return float(measure(reference, generated))
    finally:
        np.random.set_state(state)


def inception_score(blocks: Iterable[tuple[slice, Tensor]], count: int, seed: int) -> tuple[float, float]:
    """exp of the mean divergence of class probabilities from their mean: mean and spread over `SPLITS` parts.

    `blocks` yields the rows of samples and their logits `[B, K]`. The parts are the original implementation's
    (OpenAI's improved-gan: `[k N // 10, (k + 1) N // 10)`), but of the `count` samples in an order drawn from
    `seed`: where samples come class after class, each part would hold a tenth of the classes.
    """
    ends = [(k + 1) * count // SPLITS for k in range(SPLITS)]
    part = np.empty(count, np.int64)
    order = numpy_generator(seed, "fid/inception_score").permutation(count)
    part[order] = np.searchsorted(ends, np.arange(count), side="right")
    weights = F.one_hot(torch.from_numpy(part), SPLITS).double()
    weights /= weights.sum(0)  # [N, 10]
    mean = entropy = torch.zeros(())
    for rows, logits in blocks:
        log_p = logits.double().log_softmax(1)
        p, of_part = log_p.exp(), weights[rows].T.to(logits.device)
        mean = mean + of_part @ p  # [10, K]
        entropy = entropy + of_part @ (p * log_p).sum(1)  # [10]
    scores = (entropy - torch.special.xlogy(mean, mean).sum(1)).exp()
    return float(scores.mean()), float(scores.std(correction=0))


@torch.inference_mode()
def precision_recall(
    generated: Features, real: Features, images: int, device: str | torch.device = "cpu", *, seed: int
) -> tuple[float, float]:
    """Improved precision and recall of features `[N, D]` and `[M, D]` (Kynkäänniemi et al. 2019).

    Precision is the share of generated samples that lie within the distance of some real one to its k-th
    neighbour, recall the share of real ones within that of some generated one. Of each set, `images` drawn
    from `seed` take part, in float64.
    """
    points = []
    for name, features in (("generated", generated), ("real", real)):
        rng = numpy_generator(seed, "fid/precision_recall", name)
        rows = np.sort(rng.permutation(len(features))[:images])  # sorted, a file is read faster
        points.append(torch.from_numpy(features[rows]).to(device, torch.float64))
    made, found = points
    return _share_within(made, found), _share_within(found, made)


def _share_within(points: Tensor, others: Tensor) -> float:
    """The share of `points` `[N, D]` that some of the `others` `[M, D]` have among their neighbours."""
    assert len(others) > NEIGHBOURS
    radii, inside = [], 0
    for block in others.split(BLOCK):
        nearest = _squared_distances(block, others).topk(NEIGHBOURS + 1, largest=False)  # with itself
        radii.append(nearest.values[:, -1])
    for block in points.split(BLOCK):
        inside += int((_squared_distances(block, others) <= torch.cat(radii)).any(1).sum())
    return inside / len(points)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances `[A, B]` of points `[A, D]` and `[B, D]`."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)
