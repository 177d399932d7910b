"""Metrics beside the Fréchet distance, from features or class logits."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from drift.evaluation.store import BLOCK, FeatureStore
from drift.runtime.seeds import derive_seed, numpy_generator
from drift.runtime.torchvision import ensure_torchvision

SPLITS = 10  # of the Inception Score (Salimans et al. 2016)
NEIGHBOURS = 3  # k of precision and recall (Kynkäänniemi et al. 2019)


def kernel_distance(
    reference: FeatureStore | np.ndarray, generated: FeatureStore | np.ndarray, seed: int
) -> float:
    """KID of two sets of features `[N, D]`, `[M, D]`: clean-fid's function, with subsets drawn from `seed`.

    clean-fid draws them from NumPy's global generator, whose state is restored afterwards.
    """
    ensure_torchvision()
    from cleanfid import fid as cleanfid

    state = np.random.get_state()
    np.random.seed(derive_seed(seed, "fid/kid") % 2**32)
    try:
        return float(cleanfid.kernel_distance(reference, generated))
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
    mean, entropy = 0, 0
    for rows, logits in blocks:
        log_p = logits.double().log_softmax(1)
        p, of_part = log_p.exp(), weights[rows].T.to(logits.device)
        mean = mean + of_part @ p
        entropy = entropy + of_part @ (p * log_p).sum(1)
    scores = (entropy - torch.special.xlogy(mean, mean).sum(1)).exp()
    return float(scores.mean()), float(scores.std(correction=0))


@torch.inference_mode()
def precision_recall(
    generated: FeatureStore | np.ndarray,
    real: FeatureStore | np.ndarray,
    images: int,
    device: str | torch.device = "cpu",
    *,
    seed: int,
) -> tuple[float, float]:
    """Improved precision and recall of features `[N, D]` and `[M, D]` (Kynkäänniemi et al. 2019).

    Precision is the share of generated samples that lie within the distance of some real one to its k-th
    neighbour, recall the share of real ones within that of some generated one. Of each set, `images` drawn
    from `seed` take part. Computed in blocks and in float64.
    """
    made, found = (
        _Points(features, numpy_generator(seed, "fid/precision_recall", name), images, device)
        for name, features in (("generated", generated), ("real", real))
    )
    return made.share_within(found), found.share_within(made)


class _Points:
    """Random rows of a set of features, and the squared distance of each to its k-th neighbour."""

    def __init__(
        self,
        features: FeatureStore | np.ndarray,
        rng: np.random.Generator,
        images: int,
        device: str | torch.device,
    ):
        self._features, self._device = features, device
        self._rows = np.sort(rng.permutation(len(features))[:images])  # sorted, a file is read faster
        assert len(self._rows) > NEIGHBOURS
        self._radii = torch.cat([self._radius(start, block) for start, block in self._blocks()])

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self._rows), BLOCK):
            block = self._features[self._rows[start : start + BLOCK]]
            yield start, torch.from_numpy(block).to(self._device, torch.float64)

    def _radius(self, start: int, block: Tensor) -> Tensor:
        nearest = block.new_empty(len(block), 0)
        for other_start, other in self._blocks():
            distances = _squared_distances(block, other)
            if start == other_start:
                distances.fill_diagonal_(torch.inf)  # a sample is not its own neighbour
            nearest = torch.cat([nearest, distances], 1)
            nearest = nearest.topk(min(NEIGHBOURS, nearest.shape[1]), 1, largest=False).values
        return nearest[:, -1]

    def share_within(self, others: "_Points") -> float:
        """Share of these points that some of the others have among their neighbours."""
        inside = 0
        for _, block in self._blocks():
            found = torch.zeros(len(block), dtype=torch.bool, device=block.device)
            for start, other in others._blocks():
                found |= (_squared_distances(block, other) <= others._radii[start : start + len(other)]).any(
                    1
                )
            inside += int(found.sum())
        return inside / len(self._rows)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances `[A, B]` of points `[A, D]` and `[B, D]`."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)
