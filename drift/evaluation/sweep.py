"""Metrics of a generator's samples, over a sweep of the CFG strength omega and of its EMA copies.

Features are written to disk as they come, a row per sample; all metrics are made from that file. So neither
batch size nor number of processes shows in them, memory does not grow with the number of images, and a sweep
that is killed goes on at the first missing sample.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drift.evaluation.batches import one_behind
from drift.evaluation.metrics import inception_score, kernel_distance, precision_recall
from drift.evaluation.networks import FeatureNetwork
from drift.evaluation.png import PngFolder
from drift.evaluation.reference import ALONE, Reference, require_enough, store_statistics
from drift.evaluation.sample import ImageDecoder, Samples
from drift.evaluation.store import FeatureStore
from drift.models.generator import Generator
from drift.runtime.errors import UserError, one_of
from drift.runtime.files import write_json
from drift.runtime.processes import Ranks

Entry = dict[str, Any]
"""One point of the sweep: omega, ema_decay, fid, and what else of `COLUMNS` was measured."""
COLUMNS = (
    *("omega", "ema_decay", "fid", "kid", "inception_score", "inception_score_std"),
    *("precision", "recall", "accuracy", "dir"),
)
METRICS = ("kid", "inception_score", "precision_recall")
"""What can be measured beside the Fréchet distance."""
_PROGRESS_FILE = "sweep.json"  # the finished points, in the work folder


@dataclass(frozen=True)
class Sweep:
    """What is measured of which points: the same samples of every EMA copy at every CFG strength."""

    samples: Samples
    omegas: Sequence[float]
    ema_decays: Sequence[float | None]
    metrics: Sequence[str] = ()
    """Of `METRICS`."""
    precision_recall_images: int = 10_000

    @property
    def points(self) -> Iterator[tuple[float | None, float]]:
        """(EMA decay, omega), by decay and then by omega."""
        return ((decay, omega) for decay in self.ema_decays for omega in self.omegas)


@dataclass(frozen=True)
class Tools:
    """What samples are made and measured with."""

    load: Callable[[float | None], Generator]
    """EMA decay -> that copy of the generator, on its device."""
    decode: ImageDecoder
    network: FeatureNetwork
    reference: Reference


def check_metrics(metrics: Sequence[str], network: FeatureNetwork, reference_has_features: bool) -> None:
    """Raise `UserError` if the network or the reference does not allow one of the `metrics`."""
    for metric in metrics:
        one_of("metric", metric, *METRICS)
        if metric == "inception_score" and network.classify is None:
            raise UserError(
                f"fid.metrics has inception_score, but {network.name} does not classify; leave it out"
            )
        if metric != "inception_score" and not reference_has_features:
            raise UserError(
                f"fid.metrics has {metric}, which compares single images, but fid.reference is a file of "
                f"statistics; leave {metric} out, or take images as the reference"
            )


def evaluate_sweep(
    sweep: Sweep,
    tools: Tools,
    work: Path,
    *,
    png: Path | None = None,
    ranks: Ranks = ALONE,
    on_images: Callable[[int], None] = lambda images: None,
) -> list[Entry]:
    """Measure every point of the sweep; returns the entries in the order of `sweep.points`.

    `work` keeps finished entries and the features of the current point: a killed sweep goes on from there.
    `png` is where PNG files of the samples are kept, in folders `gen_omega_<w>/`; a point whose files are
    missing is made again, and files of another run (`work` has another name) are removed. `on_images`
    receives how many samples all processes have made, if they keep pace. Raises `UserError` if there are too
    few samples for the network's features, or what `check_metrics` does.
    """
    samples = sweep.samples
    require_enough(len(samples), tools.network, "generated images per omega (fid.images)")
    check_metrics(sweep.metrics, tools.network, tools.reference.features is not None)
    progress = work / _PROGRESS_FILE
    known = ranks.from_first(json.loads(progress.read_text()) if progress.exists() else [])
    entries: list[Entry] = []
    for number, (decay, omega) in enumerate(sweep.points):
        folder = None
        if png is not None:
            folder = PngFolder(png, omega, decay if len(sweep.ema_decays) > 1 else None)
            if ranks.first:
                folder.claim(work.name)
            ranks.barrier()
        entry = next((e for e in known if (e["ema_decay"], e["omega"]) == (decay, omega)), None)
        if entry is None or (folder is not None and not folder.finished):
            point = work / f"samples-{decay}-{omega:g}"
            made = number * len(samples)
            for batch in _generate(tools.load(decay), tools, samples, omega, point, folder, ranks):
                on_images(made + batch)
            if ranks.first:  # the metrics take one machine's cores as they are
                entry = {"omega": omega, "ema_decay": decay, **_measure(FeatureStore(point), sweep, tools)}
                if folder is not None:
                    entry["dir"] = str(folder.folder)
                    folder.finish(entry)
                known = [e for e in known if (e["ema_decay"], e["omega"]) != (decay, omega)] + [entry]
                write_json(progress, known)
                shutil.rmtree(point)
            entry = ranks.from_first(entry)
        entries.append(entry)
        on_images((number + 1) * len(samples))
    return entries


def _generate(
    generator: Generator,
    tools: Tools,
    samples: Samples,
    omega: float,
    work: Path,
    folder: PngFolder | None,
    ranks: Ranks,
) -> Iterator[int]:
    """Write the features of all samples that `work` lacks, by all processes; yields how many are there."""
    if ranks.first:
        FeatureStore.create(work, len(samples), tools.network.dimension)
    ranks.barrier()
    store, pool = FeatureStore(work), tools.network.pool
    missing = store.missing()
    if folder is not None:
        missing = np.union1d(missing, folder.missing(len(samples)))
    ranks.barrier()  # nobody writes before everybody has looked
    mine, made = np.array_split(missing, ranks.world_size)[ranks.rank], len(samples) - len(missing)
    batches = samples.images(generator, tools.decode, mine, omega)
    for (indices, images), resized in one_behind(batches, lambda batch: tools.network.resized(batch[1])):
        writing = pool.map(folder.write, indices, images.numpy()) if folder is not None else ()
        features = tools.network.features(resized).cpu().numpy()
        for _ in writing:  # to the end, and raises what a thread has met
            pass
        store.write(indices, features)
        made += len(indices) * ranks.world_size
        yield min(made, len(samples))
    ranks.barrier()


def _measure(store: FeatureStore, sweep: Sweep, tools: Tools) -> Entry:
    """What one point of the sweep has of `COLUMNS`."""
    network, reference, seed = tools.network, tools.reference, sweep.samples.seed
    statistics = store_statistics(store, network, sweep.samples.labels)
    entry: Entry = {"fid": statistics.distance(reference.statistics)}
    if "kid" in sweep.metrics:
        entry["kid"] = kernel_distance(reference.features, store, seed)
    if "inception_score" in sweep.metrics:
        logits = ((rows, network.logits(block)) for rows, block in store.blocks())
        entry["inception_score"], entry["inception_score_std"] = inception_score(logits, len(store), seed)
    if "precision_recall" in sweep.metrics:
        entry["precision"], entry["recall"] = precision_recall(
            store, reference.features, sweep.precision_recall_images, network.device, seed=seed
        )
    if statistics.accuracy is not None:
        entry["accuracy"] = statistics.accuracy
    return entry


def best_entry(sweep: Sequence[Entry]) -> Entry:
    """The entry of the lowest Fréchet distance."""
    return min(sweep, key=lambda entry: entry["fid"])
