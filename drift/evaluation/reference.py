"""What generated images are compared with, and whether the measurement can be trusted.

Statistics of real images are measured once: features and moments are kept in a folder that is named by a
digest of all that they depend on.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from drift.data.datasets import Dataset, ImageFiles, open_images, refuse_or_leave_out
from drift.data.views import center_views, view_digest
from drift.evaluation.moments import FeatureStatistics, Moments
from drift.evaluation.networks import FeatureNetwork
from drift.evaluation.store import ALONE, FeatureStore, measure_rows
from drift.runtime.errors import UserError
from drift.runtime.files import atomic_write, check_readable, sha256
from drift.runtime.lock import Lock
from drift.runtime.processes import Ranks
from drift.runtime.seeds import numpy_generator
from drift.runtime.work import work_root
from drift.settings import Settings

_WAIT_S = 1.0  # between two looks at a lock
_VERSIONS = ("clean-fid", "pillow", "torch", "torchvision")  # packages whose version features depend on

# Of the self-test, relative to the trace of the covariance. Rounding leaves 1e-9 where all is well.
_ZERO = 1e-5
_SHIFT = 0.1  # of each feature, in its standard deviations
_SCALE = 0.1  # by which features grow


@dataclass(frozen=True)
class Reference:
    """Real images, as the statistics that generated ones are compared with."""

    name: str
    digest: str
    statistics: FeatureStatistics
    file: Path
    """Where the statistics are; `load_statistics` takes a copy of it anywhere."""
    features: FeatureStore | None = None
    """None if only statistics are known."""


def open_reference(name: str, dataset: str, root: str | None, classes: int) -> Dataset | None:
    """The real images that `name` means: a split of the dataset, or a folder (a path with a slash).

    None for an `.npz` of statistics. Raises `UserError` if they are not there.
    """
    if name.endswith(".npz"):
        check_readable(name, f"fid.reference = {name}", "correct the path")
        return None
    return ImageFiles(name) if "/" in name else open_images(dataset, root, name, classes)


def load_statistics(path: str | Path, dimension: int, features: str | None = None) -> Reference:
    """A reference from an `.npz` with `mu` `[D]` and `sigma` `[D, D]`, as clean-fid names them.

    The release names them `ref_mu` and `ref_sigma`. Raises `UserError` if the file is missing, damaged, of
    another dimension or no covariance; or if `measure_images` has written it with another feature network
    than that of the digest `features`.
    """
    path = Path(path)
    check_readable(path, f"fid.reference = {path}", "correct the path")
    made_with = accuracy = count = None
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = ("mu", "sigma") if "mu" in file else ("ref_mu", "ref_sigma")
            if lacking := [key for key in keys if key not in file]:
                raise UserError(
                    f"{path}: has the arrays {', '.join(file)}, and no {' or '.join(lacking)}; reference "
                    "statistics are mu and sigma, or ref_mu and ref_sigma"
                )
            mu, sigma = (file[key] for key in keys)
            if "feature_network" in file:  # of our own
                made_with, accuracy, count = (
                    file[k].item() for k in ("feature_network", "accuracy", "count")
                )
    except (ValueError, TypeError, EOFError, BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error}); get a fresh copy") from None
    if made_with is not None and features not in (None, made_with):
        raise UserError(
            f"fid.reference = {path}: was measured with another feature network ({made_with[:12]}) than "
            f"that of fid.features and fid.mode ({features[:12]}); measure it again with this one"
        )
    names = " and ".join(keys)
    if mu.shape != (dimension,) or sigma.shape != (dimension, dimension):
        raise UserError(
            f"{path}: {names} have shapes {list(mu.shape)} and {list(sigma.shape)}, but the features have "
            f"{dimension} dimensions; take the feature network that the file was made with"
        )
    floats = all(np.issubdtype(array.dtype, np.floating) for array in (mu, sigma))
    if not (floats and np.isfinite(mu).all() and _symmetric(sigma) and (np.diag(sigma) >= 0).all()):
        raise UserError(
            f"{path}: {names} are no mean and covariance: not real, not finite or not symmetric; "
            "get a fresh copy"
        )
    accuracy = None if accuracy is None or np.isnan(accuracy) else accuracy
    statistics = FeatureStatistics(mu.astype(np.float64), sigma.astype(np.float64), accuracy, count)
    return Reference(str(path), sha256(path), statistics, path)


def _symmetric(sigma: np.ndarray) -> bool:
    return bool(np.isfinite(sigma).all() and abs(sigma - sigma.T).max() <= 1e-6 * abs(sigma).max())


def measure_images(
    source: Dataset,
    network: FeatureNetwork,
    settings: Settings,
    *,
    images: int | None = None,
    ranks: Ranks = ALONE,
    on_images: Callable[[int], None] = lambda images: None,
) -> Reference:
    """Features and statistics of the centre views of `source`: of all, or of `images` of them at random.

    They are kept in the work folder and read from there the next time; an interrupted measurement goes on.
    `on_images` receives the number of measured images. Raises `UserError` if there are too few for the
    network's features, or if some do not decode and `encode.on_bad_image` does not skip them.
    """
    count = len(source) if images is None else min(images, len(source))
    require_enough(count, network, f"real images of {source.split}")
    size, on_bad_image = settings.data.image_size, settings.encode.on_bad_image
    chosen = np.sort(numpy_generator(settings.seed, "fid/real").permutation(len(source))[:count])
    chosen_digest = hashlib.sha256(chosen.tobytes()).hexdigest()
    depends_on = [network.digest, source.digest, size, chosen_digest, view_digest("center")]
    depends_on += [version(package) for package in _VERSIONS]
    digest = hashlib.sha256(repr(depends_on).encode()).hexdigest()
    folder = work_root() / "reference" / digest[:16]
    result = folder / "statistics.npz"
    with _locked(folder, ranks.first), ThreadPoolExecutor(max(1, settings.hardware.workers)) as pool:

        def resized(rows: np.ndarray, images: np.ndarray) -> tuple[Tensor, np.ndarray]:
            views, undecodable = center_views(source, images.tolist(), size, pool)
            return network.resized(torch.from_numpy(views)), undecodable

        if ranks.first and source.passed_over:
            print(source.passed_over, flush=True)
        store = FeatureStore.create(folder, count, network.dimension, ranks)
        missing = store.missing()
        if ranks.first and len(missing):
            result.unlink(missing_ok=True)  # it may lack images that were left out and are repaired
        batch_size = settings.hardware.sample_batch
        how = {"batch_size": batch_size, "ranks": ranks, "on_images": on_images}
        measure_rows(store, missing, network, lambda rows: chosen[rows], resized, **how)
        bad = store.undecodable()
        refuse_or_leave_out(source, chosen[bad].tolist(), on_bad_image, show=ranks.first)
        require_enough(count - len(bad), network, f"real images of {source.split} that decode")
        kept, store = np.delete(chosen, bad), FeatureStore(folder, bad)
        if ranks.first and not result.exists():
            labels = None if source.labels is None else source.labels[kept]
            _save(result, store_statistics(store, network, labels), network.digest)
        ranks.barrier()
        if len(bad):
            digest = hashlib.sha256(digest.encode() + kept.tobytes()).hexdigest()
        on_images(count)
        statistics = load_statistics(result, network.dimension).statistics
        return Reference(source.split, digest, statistics, result, store)


@contextmanager
def _locked(folder: Path, first: bool) -> Iterator[None]:
    """Hold the lock of `folder`; wait for another run that measures the same images."""
    if not first:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock, shown = Lock(folder), ""
    while not lock.acquire():
        if shown != (shown := lock.holder()):
            print(f"{folder}: waiting for another run that measures the same images ({shown})", flush=True)
        time.sleep(_WAIT_S)
    try:
        yield
    finally:
        lock.release()


def _save(path: Path, statistics: FeatureStatistics, feature_network: str) -> None:
    accuracy = np.nan if statistics.accuracy is None else statistics.accuracy
    found = {"mu": statistics.mean, "sigma": statistics.covariance, "count": statistics.count}
    with atomic_write(path) as file:
        np.savez(file, **found, accuracy=accuracy, feature_network=feature_network)


def store_statistics(
    store: FeatureStore, network: FeatureNetwork, labels: np.ndarray | None
) -> FeatureStatistics:
    """Statistics of all features in a store; `labels [N]` are compared with what the network predicts."""
    moments, correct = Moments(network.dimension, network.device), None
    for rows, block in store.blocks():
        moments.update(torch.from_numpy(block).to(network.device))
        if network.labels and labels is not None:
            predicted = network.logits(block).argmax(1).cpu().numpy()
            correct = (correct or 0) + int((predicted == labels[rows]).sum())
    return FeatureStatistics.of(moments, None if correct is None else correct / len(store))


def require_enough(count: int, network: FeatureNetwork, what: str) -> None:
    """Raise `UserError` if `count` images (`what` says which) are too few for the network's features."""
    # The covariance of n vectors has rank n - 1 at most
    if count <= network.dimension:
        raise UserError(
            f"{count} {what}: too few for the Fréchet distance, as the covariance of the {network.dimension} "
            f"features of {network.name} would be singular; take more than {network.dimension}"
        )


def self_test(reference: Reference, seed: int) -> dict[str, Any]:
    """Measure known distances; raises `UserError` where one comes out wrong.

    - `same`: the distance of the reference to itself, which is 0.
    - `shift`: that to itself with every feature moved by a tenth of its standard deviation: a hundredth of
      the sum of the variances.
    - `scale`: that to itself with all features 10 % larger: a hundredth of the sum of their mean squares.
    - `halves`: that between two halves of the reference, drawn from `seed`: the floor, which no generator can
      be expected to beat with as few images. None without features, or with too few of them.
    """
    statistics = reference.statistics
    mean, covariance = statistics.mean, statistics.covariance
    trace = float(np.trace(covariance))
    moved = FeatureStatistics(mean + _SHIFT * np.sqrt(np.diag(covariance)), covariance)
    larger = FeatureStatistics(mean * (1 + _SCALE), covariance * (1 + _SCALE) ** 2)
    found = {}
    for name, expected, other in (
        ("same", 0.0, statistics),
        ("shift", _SHIFT**2 * trace, moved),
        ("scale", _SCALE**2 * (trace + float(mean @ mean)), larger),
    ):
        measured = statistics.distance(other)
        if not abs(measured - expected) <= _ZERO * trace + 1e-6 * expected:
            raise UserError(
                f"self-test of the reference {reference.name}: '{name}' gives {measured:.6g} and not "
                f"{expected:.6g}, so no distance to it can be trusted; its covariance is no valid one, or "
                "too few images are in it: make it again from more images"
            )
        found[name] = {"expected": expected, "measured": measured}
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
    a, b = map(FeatureStatistics.of, halves)
    return a.distance(b)
