"""Fréchet distance of a generator to real images, over a sweep of the CFG strength omega.

Moments of the features are float64 and are merged over processes, so neither batch size nor number of
processes shows in them; the distance is clean-fid's own function, so numbers compare with published ones.
"""

import csv
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from drift.data.images import ImageSource, center_view
from drift.errors import UserError
from drift.evaluation.features import FeatureNetwork
from drift.evaluation.sample import sample_images
from drift.files import atomic_write
from drift.models.generator import Generator
from drift.models.vae import VAE
from drift.seeds import numpy_generator
from drift.torchvision_shim import ensure_torchvision

AllReduceSum = Callable[[Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]
"""(labels `[B]`, uint8 images `[B, H, W, 3]`)"""
Entry = Mapping[str, float]
"""One point of the sweep: omega, fid and perhaps accuracy."""

_KEYS = (("mu", "sigma"), ("ref_mu", "ref_sigma"))  # clean-fid's and the prior's names; the release's


def _alone(tensor: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return tensor


class Moments:
    """Count, mean and covariance of feature vectors that arrive in batches, in float64.

    Parts are merged by the update of Chan, Golub and LeVeque (1979), which does not subtract large sums.
    """

    def __init__(self, dimension: int, device: str | torch.device = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)
        """Sum of outer products of the deviations from the mean."""

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance `[D, D]`."""
        assert self.count > 1
        return self.scatter / (self.count - 1)

    def update(self, features: Tensor) -> None:
        """Take in features `[B, D]`."""
        batch = Moments(len(self.mean), self.mean.device)
        features = features.to(self.mean)
        batch.count = len(features)
        batch.mean = features.mean(0)
        deviations = features - batch.mean
        batch.scatter = deviations.T @ deviations
        self.merge(batch)

    def merge(self, other: "Moments") -> None:
        """Take in what `other` has seen."""
        count = self.count + other.count
        if count == 0:
            return
        shift = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(shift, shift) * (self.count * other.count / count)
        self.mean += shift * (other.count / count)
        self.count = count

    def all_reduce(self, all_reduce_sum: AllReduceSum) -> "Moments":
        """The moments of what all processes have seen; every process must call it."""
        merged = Moments(len(self.mean), self.mean.device)
        merged.count = int(all_reduce_sum(self.mean.new_tensor(self.count)))
        merged.mean = all_reduce_sum(self.mean * self.count) / merged.count
        shift = self.mean - merged.mean
        merged.scatter = all_reduce_sum(self.scatter + self.count * torch.outer(shift, shift))
        return merged


@dataclass(frozen=True)
class FeatureStatistics:
    """A Gaussian fit to the features of a set of images, and how often their labels were recognised."""

    mean: np.ndarray  # [D]
    covariance: np.ndarray  # [D, D]
    accuracy: float | None = None
    """Share of images whose predicted label is theirs; None where the network does not classify."""


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Fréchet distance of N(mu1, sigma1) and N(mu2, sigma2), computed by clean-fid.

    Raises `FloatingPointError` if an argument or the result is not finite.
    """
    ensure_torchvision()
    from cleanfid import fid as cleanfid

    for name, array in (("mu1", mu1), ("sigma1", sigma1), ("mu2", mu2), ("sigma2", sigma2)):
        if not np.isfinite(array).all():
            raise FloatingPointError(f"Fréchet distance: {name} is not finite")
    with warnings.catch_warnings():
        # clean-fid passes sqrtm an argument that SciPy 1.18 drops
        warnings.filterwarnings("ignore", "The `disp` argument", DeprecationWarning)
        distance = float(cleanfid.frechet_distance(mu1, sigma1, mu2, sigma2))
    if not np.isfinite(distance):
        raise FloatingPointError(f"the Fréchet distance is {distance}")
    return distance


def feature_statistics(
    batches: Batches, network: FeatureNetwork, all_reduce_sum: AllReduceSum
) -> FeatureStatistics:
    """Statistics of the images in `batches` of all processes, each of which has its own part of them."""
    moments = Moments(network.dimension, network.device)
    correct = torch.zeros((), dtype=torch.float64, device=network.device)
    for labels, images in batches:
        features, predicted = network(images)
        moments.update(features)
        if predicted is not None:
            correct += (predicted == labels.to(network.device)).sum()
    moments = moments.all_reduce(all_reduce_sum)
    accuracy = None if network.classify is None else float(all_reduce_sum(correct)) / moments.count
    return FeatureStatistics(moments.mean.cpu().numpy(), moments.covariance.cpu().numpy(), accuracy)


def load_statistics(path: str | Path, dimension: int) -> FeatureStatistics:
    """Reference statistics from an `.npz` with `mu` `[D]` and `sigma` `[D, D]`, or `ref_mu` and `ref_sigma`.

    Raises `UserError` if the file is missing or cut short, has neither pair, or D is not `dimension`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of reference statistics; correct the path")
    if not is_zipfile(path):
        raise UserError(f"{path}: not an .npz file, or cut short; get a fresh copy")
    with np.load(path, allow_pickle=False) as file:
        keys = next((pair for pair in _KEYS if all(key in file for key in pair)), None)
        if keys is None:
            wanted = " or ".join(" and ".join(pair) for pair in _KEYS)
            raise UserError(f"{path}: has the arrays {', '.join(file)}; reference statistics are {wanted}")
        mu, sigma = (file[key].astype(np.float64) for key in keys)
    if mu.shape != (dimension,) or sigma.shape != (dimension, dimension):
        raise UserError(
            f"{path}: {keys[0]} {list(mu.shape)} and {keys[1]} {list(sigma.shape)} do not fit features of "
            f"{dimension} dimensions; take the feature network that the file was made with"
        )
    return FeatureStatistics(mu, sigma)


def real_statistics(
    source: ImageSource,
    network: FeatureNetwork,
    *,
    image_size: int,
    batch_size: int,
    images: int | None = None,
    seed: int = 0,
    workers: int = 1,
    rank: int = 0,
    world_size: int = 1,
    all_reduce_sum: AllReduceSum = _alone,
) -> FeatureStatistics:
    """Statistics of the centre views of `source`: of all, or of at most `images` drawn without replacement.

    `workers` threads decode. Raises `UserError` if there are too few images for the network's features.
    """
    count = len(source) if images is None else min(images, len(source))
    require_enough(count, network, f"real images of the split {source.split}")
    chosen = np.sort(numpy_generator(seed, "fid/real").permutation(len(source))[:count])
    mine = chosen[rank::world_size]

    def batches() -> Batches:
        with (
            ThreadPoolExecutor(max(1, workers)) as pool,
            tqdm(total=len(mine), desc="real images", unit="image", disable=rank != 0) as progress,
        ):
            for start in range(0, len(mine), batch_size):
                batch = mine[start : start + batch_size]
                views = pool.map(lambda index: center_view(source.load(index), image_size), batch)
                yield torch.from_numpy(source.labels[batch]), torch.from_numpy(np.stack(list(views)))
                progress.update(len(batch))

    return feature_statistics(batches(), network, all_reduce_sum)


def evaluate_sweep(
    generator: Generator,
    vae: VAE,
    network: FeatureNetwork,
    reference: FeatureStatistics,
    training: FeatureStatistics | None = None,
    *,
    omegas: Sequence[float],
    images: int,
    classes: int,
    seed: int,
    batch_size: int,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    all_reduce_sum: AllReduceSum = _alone,
    finished: Sequence[Entry] = (),
    on_entry: Callable[[Entry], None] = lambda entry: None,
    on_images: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """Measure `images` samples at every CFG strength in `omegas` against `reference`.

    Returns what `metrics/fid.json` holds, the same on every process: `sweep`, an entry per omega with
    `omega`, `fid` and, where the network classifies, `accuracy`, the share of samples in which it reads the
    class that was asked for; `best`, the entry of the lowest `fid`; `floor`, the distance of the `training`
    images to `reference`, which a perfect generator could not be expected to beat; `images`; and
    `classifier_accuracy_real`, the network's accuracy on the reference images. The last and `floor` are None
    where they are not known.

    `finished` has the entries of an interrupted sweep, which are not measured again; `on_entry` sees each
    new one, and `on_images` after each batch how many samples of the whole sweep all processes have made, if
    they keep pace. Raises `UserError` if `images` are too few for the network's features.
    """
    require_enough(images, network, "generated images per omega")
    known = {entry["omega"]: dict(entry) for entry in finished}
    sweep = []

    def counted(samples: Iterable[tuple[Sequence[int], Tensor, Tensor]]) -> Batches:
        for indices, labels, pictures in samples:
            yield labels, pictures
            made = (indices[-1] // world_size + 1) * world_size
            on_images(len(sweep) * images + min(made, images))

    for omega in omegas:
        if omega not in known:
            samples = sample_images(
                generator,
                vae,
                range(images),
                omega,
                seed,
                batch_size,
                classes=classes,
                device=device,
                rank=rank,
                world_size=world_size,
            )
            statistics = feature_statistics(counted(samples), network, all_reduce_sum)
            known[omega] = {"omega": omega, "fid": _distance(statistics, reference)}
            if statistics.accuracy is not None:
                known[omega]["accuracy"] = statistics.accuracy
            on_entry(known[omega])
        sweep.append(known[omega])
    return {
        "best": min(sweep, key=lambda entry: entry["fid"]),
        "sweep": sweep,
        "floor": None if training is None else _distance(training, reference),
        "images": images,
        "classifier_accuracy_real": reference.accuracy,
    }


def write_sweep_csv(path: str | Path, sweep: Sequence[Entry]) -> None:
    """Write the entries of a sweep atomically as CSV: omega, fid, accuracy (empty where there is none)."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ("omega", "fid", "accuracy"), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sweep)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def _distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def require_enough(count: int, network: FeatureNetwork, what: str) -> None:
    """Raise `UserError` if `count` images (`what` says which) are too few for the network's features."""
    # The covariance of n vectors has rank n - 1 at most
    if count <= network.dimension:
        raise UserError(
            f"{count} {what}: too few for the Fréchet distance, as the covariance of the {network.dimension} "
            f"features of {network.name} would be singular; take more than {network.dimension}"
        )
