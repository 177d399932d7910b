"""What generated images are compared with, and whether the measurement can be trusted.

Statistics of real images are measured once: features and moments are kept in a folder that is named by a
digest of all that they depend on.
"""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from drift.data.datasets import Dataset, ImageFiles, open_images, refuse_or_leave_out
from drift.data.views import center_views, view_digest
from drift.evaluation.batches import one_behind
from drift.evaluation.moments import AllReduceSum, Moments, alone, frechet_distance
from drift.evaluation.networks import FeatureNetwork
from drift.evaluation.store import FeatureStore
from drift.runtime.errors import UserError
from drift.runtime.files import atomic_write, check_readable, sha256
from drift.runtime.lock import Lock
from drift.runtime.seeds import numpy_generator

_KEYS = (("mu", "sigma"), ("ref_mu", "ref_sigma"))  # clean-fid's and the prior's names; the release's
_WAIT_S = 1.0  # between two looks at a lock
_DECIDING = ("clean-fid", "pillow", "torch", "torchvision")  # packages whose version decides features

# Of the self-test, relative to the trace of the covariance. The square root leaves 1e-9 where all is well.
_ZERO = 1e-5
_SHIFT = 0.1  # of each feature, in its standard deviations
_SCALE = 0.1  # by which features grow


def _nobody() -> None:
    """Whom a process without peers waits for."""


@dataclass(frozen=True)
class Peers:
    """The processes that measure together, and this one among them."""

    rank: int = 0
    world_size: int = 1
    all_reduce_sum: AllReduceSum = alone
    device: str | torch.device = "cpu"
    """Where the tensors are that `all_reduce_sum` takes."""
    wait: Callable[[], None] = _nobody
    """Returns when all have come here. Not `all_reduce_sum`, which makes no host wait where it is a GPU's."""

    def __post_init__(self) -> None:
        assert self.world_size == 1 or self.wait is not _nobody, "the files of several need a barrier"

    @property
    def first(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class FeatureStatistics:
    """A Gaussian fit to the features of a set of images, and how often their labels were recognised."""

    mean: np.ndarray  # [D]
    covariance: np.ndarray  # [D, D]
    accuracy: float | None = None
    """Share of images whose predicted label is theirs; None where the network does not classify."""
    count: int | None = None
    """Of the images; None where it is not known."""

    def distance(self, other: "FeatureStatistics") -> float:
        """Squared Fréchet distance."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


@dataclass(frozen=True)
class Reference:
    """Real images as they are compared with."""

    name: str
    digest: str
    statistics: FeatureStatistics
    features: FeatureStore | None = None
    """None if only statistics are known."""
    file: Path | None = None
    """Where the statistics are; `load_statistics` takes a copy of it anywhere."""


def open_reference(name: str, dataset: str, root: str | None, classes: int) -> Dataset | None:
    """The real images that `name` means: a split of the dataset, or a folder (a path with a slash).

    None for an `.npz` of statistics. Raises `UserError` if they are not there.
    """
    if name.endswith(".npz"):
        check_readable(name, f"fid.reference = {name}", "correct the path")
        return None
    return ImageFiles(name) if "/" in name else open_images(dataset, root, name, classes)


def load_statistics(path: str | Path, dimension: int, features: str | None = None) -> Reference:
    """A reference from an `.npz` with `mu` `[D]` and `sigma` `[D, D]`, or `ref_mu` and `ref_sigma`.

    Raises `UserError` if the file is missing or cut short, has neither pair of
    floats, D is not `dimension`, or `sigma` is no covariance; or if it is one that `measure_images` has
    written with another feature network than that of the digest `features`.
    """
    path = Path(path)
    check_readable(path, f"fid.reference = {path}", "correct the path")
    if not is_zipfile(path):
        raise UserError(f"{path}: not an .npz file, or cut short; get a fresh copy")
    with np.load(path, allow_pickle=False) as file:
        keys = next((pair for pair in _KEYS if all(key in file for key in pair)), None)
        if keys is None:
            wanted = " or ".join(" and ".join(pair) for pair in _KEYS)
            raise UserError(f"{path}: has the arrays {', '.join(file)}; reference statistics are {wanted}")
        made_with = str(file["feature_network"]) if "feature_network" in file else None
        try:
            mu, sigma = (np.asarray(file[key]) for key in keys)
        except (ValueError, BadZipFile) as error:  # ValueError: pickled objects
            raise UserError(
                f"{path}: {keys[0]} or {keys[1]} cannot be read ({error}); get a fresh copy"
            ) from None
    if not all(np.issubdtype(array.dtype, np.floating) for array in (mu, sigma)):
        raise UserError(f"{path}: {keys[0]} is {mu.dtype} and {keys[1]} {sigma.dtype}; both must be floats")
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if mu.shape != (dimension,) or sigma.shape != (dimension, dimension):
        raise UserError(
            f"{path}: {keys[0]} {list(mu.shape)} and {keys[1]} {list(sigma.shape)} do not fit features of "
            f"{dimension} dimensions; take the feature network that the file was made with"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: {keys[0]} or {keys[1]} has numbers that are not finite; get a fresh copy")
    if abs(sigma - sigma.T).max() > 1e-6 * abs(sigma).max() or (np.diag(sigma) < 0).any():
        raise UserError(f"{path}: {keys[1]} is not a covariance (not symmetric); get a fresh copy")
    statistics = FeatureStatistics(mu, sigma)
    if made_with is not None:
        if features not in (None, made_with):
            raise UserError(
                f"fid.reference = {path}: was measured with another feature network ({made_with[:12]}) than "
                f"that of fid.features and fid.mode ({features[:12]}); measure it again with this one"
            )
        statistics = _load(path)
    return Reference(str(path), sha256(path), statistics, file=path)


def measure_images(
    source: Dataset,
    network: FeatureNetwork,
    cache: Path,
    *,
    image_size: int,
    batch_size: int,
    images: int | None = None,
    seed: int = 0,
    on_bad_image: str = "error",
    workers: int = 1,
    peers: Peers = Peers(),
    on_images: Callable[[int], None] = lambda images: None,
) -> Reference:
    """Features and statistics of the centre views of `source`: of all, or of `images` of them at random.

    They are kept in a folder within `cache` and read from there the next time; what was interrupted goes on.
    `workers` threads decode. `on_images` sees how many images are measured. Raises `UserError` if there are
    too few images for the network's features, or if some do not decode and `on_bad_image` is `error`; with
    `skip` these are left out.
    """
    count = len(source) if images is None else min(images, len(source))
    require_enough(count, network, f"real images of {source.split}")
    chosen = np.sort(numpy_generator(seed, "fid/real").permutation(len(source))[:count])
    depends_on = [network.digest, source.digest, image_size, hashlib.sha256(chosen.tobytes()).hexdigest()]
    depends_on += [view_digest("center"), *(version(package) for package in _DECIDING)]
    digest = hashlib.sha256(repr(depends_on).encode()).hexdigest()
    folder = cache / digest[:16]
    result = folder / "statistics.npz"
    lock = _lock(folder) if peers.first else None
    try:
        if peers.first:
            if source.passed_over:
                print(source.passed_over, flush=True)
            store = FeatureStore.create(folder, count, network.dimension)
            if len(bad := store.undecodable()):  # may have been repaired
                result.unlink(missing_ok=True)
                store.forget(bad)
        peers.wait()
        store = FeatureStore(folder)
        if not result.exists():
            missing = store.missing()
            peers.wait()  # nobody writes before everybody has looked, or they would share it out differently
            before = count - len(missing)
            mine = np.array_split(missing, peers.world_size)[peers.rank]
            with (
                ThreadPoolExecutor(max(1, workers)) as pool,
                tqdm(total=len(mine), desc="real images", unit="image", disable=not peers.first) as progress,
            ):
                batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]

                def resized(rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
                    views, undecodable = center_views(source, chosen[rows], image_size, pool)
                    return network.resized(torch.from_numpy(views)), undecodable

                for rows, (ready, undecodable) in one_behind(batches, resized):
                    store.write(rows, network.features(ready).cpu().numpy(), undecodable)
                    progress.update(len(rows))
                    on_images(min(before + progress.n * peers.world_size, count))
            peers.wait()
            bad = store.undecodable()
            refuse_or_leave_out(source, chosen[bad], on_bad_image, show=peers.first)
            require_enough(count - len(bad), network, f"real images of {source.split} that decode")
            if len(bad):
                store, chosen = FeatureStore(folder, leave_out=bad), np.delete(chosen, bad)
                digest = hashlib.sha256(digest.encode() + chosen.tobytes()).hexdigest()
            labels = None if source.labels is None else source.labels[chosen]
            statistics = store_statistics(store, network, labels, peers)
            if peers.first:
                _save(result, statistics, network.digest)
            peers.wait()
        on_images(count)
        return Reference(source.split, digest, _load(result), store, result)
    finally:
        if lock is not None:
            lock.release()


def _lock(folder: Path) -> Lock:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder)
    told = ""
    while not lock.acquire():
        if told != (told := lock.holder()):
            print(f"{folder}: waiting for another run that measures the same images ({told})", flush=True)
        time.sleep(_WAIT_S)
    return lock


def _save(path: Path, statistics: FeatureStatistics, feature_network: str) -> None:
    accuracy = np.nan if statistics.accuracy is None else statistics.accuracy
    with atomic_write(path) as file:
        np.savez(
            file,
            mu=statistics.mean,
            sigma=statistics.covariance,
            accuracy=accuracy,
            count=statistics.count,
            feature_network=feature_network,
        )


def _load(path: Path) -> FeatureStatistics:
    with np.load(path, allow_pickle=False) as file:
        accuracy = float(file["accuracy"])
        return FeatureStatistics(
            file["mu"], file["sigma"], None if np.isnan(accuracy) else accuracy, int(file["count"])
        )


def store_statistics(
    store: FeatureStore,
    network: FeatureNetwork,
    labels: np.ndarray | None,
    peers: Peers,
    also: Callable[[Tensor, Tensor], None] = lambda rows, logits: None,
) -> FeatureStatistics:
    """Statistics of all features in a store, in one pass that the processes share.

    `labels [N]` are compared with what the network predicts, where it knows them; `also` sees row numbers
    `[B]` and logits `[B, K]` of what this process reads, where the network classifies.
    """
    assert not len(store.missing()), "rows that nobody has measured"
    known = network.labels and labels is not None
    moments = Moments(network.dimension, network.device)
    correct = torch.zeros((), dtype=torch.float64, device=network.device)
    for rows, block in store.blocks(peers.rank, peers.world_size):
        features = torch.from_numpy(block).to(network.device)
        moments.update(features)
        if network.classify is not None:
            logits = network.logits(features)
            also(torch.arange(rows.start, rows.stop), logits)
            if known:
                correct += (logits.argmax(1).cpu() == torch.from_numpy(labels[rows])).sum()
    moments = moments.all_reduce(peers.all_reduce_sum)
    accuracy = float(peers.all_reduce_sum(correct)) / moments.count if known else None
    return FeatureStatistics(
        moments.mean.cpu().numpy(), moments.covariance.cpu().numpy(), accuracy, moments.count
    )


def require_enough(count: int, network: FeatureNetwork, what: str) -> None:
    """Raise `UserError` if `count` images (`what` says which) are too few for the network's features."""
    # The covariance of n vectors has rank n - 1 at most
    if count <= network.dimension:
        raise UserError(
            f"{count} {what}: too few for the Fréchet distance, as the covariance of the {network.dimension} "
            f"features of {network.name} would be singular; take more than {network.dimension}"
        )


def self_test(reference: Reference, seed: int) -> dict[str, Any]:
    """Measure what is known beforehand; raises `UserError` where the answer is another.

    - `same`: the distance of the reference to itself, which is 0.
    - `shift`: that to itself with every feature moved by a tenth of its standard deviation: a hundredth of
      the sum of the variances.
    - `scale`: that to itself with all features 10 % larger: a hundredth of the sum of their mean squares.
    - `halves`: that between two halves of the reference, drawn from `seed`, which no generator could be
      expected to beat with as few images: the floor. None without features, or with too few of them.
    """
    statistics = reference.statistics
    mean, covariance = statistics.mean, statistics.covariance
    trace, tolerance = float(np.trace(covariance)), _ZERO * float(np.trace(covariance))
    shift = _SHIFT * np.sqrt(np.diag(covariance))
    larger = 1 + _SCALE
    found = {
        "same": {"expected": 0.0, "measured": statistics.distance(statistics)},
        "shift": {
            "expected": _SHIFT**2 * trace,
            "measured": statistics.distance(FeatureStatistics(mean + shift, covariance)),
        },
        "scale": {
            "expected": _SCALE**2 * (trace + float(mean @ mean)),
            "measured": statistics.distance(FeatureStatistics(mean * larger, covariance * larger**2)),
        },
    }
    for name, numbers in found.items():
        expected, measured = numbers["expected"], numbers["measured"]
        if not abs(measured - expected) <= tolerance + 1e-6 * expected:
            raise UserError(
                f"self-test of the reference {reference.name}: '{name}' gives {measured:.6g} and not "
                f"{expected:.6g}, so no distance to it can be trusted; its covariance is no valid one, or "
                "too few images are in it: make it again from more images"
            )
    return {**found, "same": found["same"]["measured"], "halves": _halves(reference, seed)}


def _halves(reference: Reference, seed: int) -> float | None:
    store = reference.features
    if store is None or len(store) // 2 <= store.shape[1]:
        return None
    first = np.zeros(len(store), bool)
    first[numpy_generator(seed, "fid/halves").permutation(len(store))[: len(store) // 2]] = True
    halves = Moments(store.shape[1]), Moments(store.shape[1])
    for rows, block in store.blocks():
        for half, chosen in zip(halves, (first[rows], ~first[rows]), strict=True):
            if chosen.any():
                half.update(torch.from_numpy(block[chosen]))
    a, b = (FeatureStatistics(half.mean.numpy(), half.covariance.numpy()) for half in halves)
    return a.distance(b)
