"""Metrics beside the Fréchet distance, from features or class probabilities."""

import numpy as np
import torch
from torch import Tensor

from drift.evaluation.moments import AllReduceSum
from drift.evaluation.store import BLOCK, FeatureStore
from drift.runtime.seeds import derive_seed, numpy_generator
from drift.runtime.torchvision import ensure_torchvision

SPLITS = 10  # of the Inception Score (Salimans et al. 2016)
NEIGHBOURS = 3  # k of precision and recall (Kynkäänniemi et al. 2019)


def kernel_distance(
    reference: FeatureStore | np.ndarray, generated: FeatureStore | np.ndarray, seed: int
) -> float:
    """KID of two sets of features `[N, D]`, `[M, D]`: clean-fid's function, with subsets drawn from `seed`.

    clean-fid draws them from NumPy's global generator, whose state is put back afterwards.
    """
    ensure_torchvision()
    from cleanfid import fid as cleanfid

    state = np.random.get_state()
    np.random.seed(derive_seed(seed, "fid/kid") % 2**32)
    try:
        return float(cleanfid.kernel_distance(reference, generated))
    finally:
        np.random.set_state(state)


class InceptionScore:
    """exp of the mean divergence of class probabilities from their mean, over `SPLITS` random parts.

    The parts are the original implementation's (OpenAI's improved-gan: `[k N // 10, (k + 1) N // 10)`), but
    of the `count` samples in an order drawn from `seed`: where they come class after class, each part would
    hold a tenth of the classes. Sums are float64, so samples may come in any order.
    """

    def __init__(self, count: int, classes: int, device: str | torch.device = "cpu", *, seed: int):
        ends = [(k + 1) * count // SPLITS for k in range(SPLITS)]
        place = np.empty(count, np.int64)  # of each sample, in the order
        place[numpy_generator(seed, "fid/inception_score").permutation(count)] = np.arange(count)
        self._part = torch.from_numpy(np.searchsorted(ends, place, side="right")).to(device)
        zeros = {"dtype": torch.float64, "device": device}
        self._probability = torch.zeros(SPLITS, classes, **zeros)
        self._negative_entropy = torch.zeros(SPLITS, **zeros)
        self._number = torch.zeros(SPLITS, **zeros)

    def update(self, indices: Tensor, logits: Tensor) -> None:
        """Take in the samples `indices [B]` with `logits [B, K]`."""
        part = self._part[indices.to(self._part.device)]
        log_p = logits.to(self._probability).log_softmax(1)
        p = log_p.exp()
        self._probability.index_add_(0, part, p)
        self._negative_entropy.index_add_(0, part, (p * log_p).sum(1))
        self._number.index_add_(0, part, torch.ones_like(part, dtype=torch.float64))

    def compute(self, all_reduce_sum: AllReduceSum) -> tuple[float, float]:
        """Mean and standard deviation over the parts, of what all processes have seen."""
        number = all_reduce_sum(self._number)
        mean = all_reduce_sum(self._probability) / number[:, None]
        entropy = all_reduce_sum(self._negative_entropy) / number
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
    neighbour, recall the share of real ones within that of some generated one. Of each set `images` are
    taken, drawn from `seed`, in blocks and in float64.
    """
    sets = {"generated": generated, "real": real}
    generated, real = (
        _Points(features, numpy_generator(seed, "fid/precision_recall", name), images, device)
        for name, features in sets.items()
    )
    return generated.share_within(real), real.share_within(generated)


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
        # In the order of the file, which is read faster so
        self._rows = np.sort(rng.permutation(len(features))[:images])
        self._count = len(self._rows)
        assert self._count > NEIGHBOURS
        self._radii = torch.cat([self._radius(start, block) for start, block in self._blocks()])

    def _blocks(self):
        for start in range(0, self._count, BLOCK):
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
                within = _squared_distances(block, other) <= others._radii[start : start + len(other)]
                found |= within.any(1)
            inside += int(found.sum())
        return inside / self._count


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances `[A, B]` of points `[A, D]` and `[B, D]`."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)
