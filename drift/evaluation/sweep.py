"""Metrics of a generator's samples, over a sweep of the CFG strength omega and of its EMA copies.

Features are written to disk as they come, a row per sample; all metrics are made from that file. So neither
batch size nor number of processes shows in them, memory does not grow with the number of images, and a sweep
that is killed goes on at the first missing sample.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from drift.evaluation.metrics import inception_score, kernel_distance, precision_recall
from drift.evaluation.networks import FeatureNetwork
from drift.evaluation.pictures import draw_images
from drift.evaluation.png import PngFolder
from drift.evaluation.reference import Reference, store_statistics
from drift.evaluation.sample import ImageDecoder
from drift.evaluation.store import ALONE, FeatureStore, measure_rows
from drift.models.generator import Generator
from drift.runtime.files import write_json
from drift.runtime.processes import Ranks
from drift.settings import Settings

Entry = dict[str, Any]
"""One point of the sweep: omega, ema_decay, fid, and what else of `COLUMNS` was measured."""
COLUMNS = (
    *("omega", "ema_decay", "fid", "kid", "inception_score", "inception_score_std"),
    *("precision", "recall", "accuracy", "dir"),
)
_FINISHED = "points.json"  # in the work folder


@dataclass(frozen=True)
class Sweep:
    """The same samples of every EMA copy at every CFG strength, compared with one reference."""

    settings: Settings
    labels: np.ndarray
    """`[N]`, of every sample."""
    decays: Sequence[float | None]
    load: Callable[[float | None], Generator]
    """EMA decay -> that copy of the generator, on its device."""
    decode: ImageDecoder
    network: FeatureNetwork
    reference: Reference
    ranks: Ranks = ALONE

    def run(self, work: Path, on_images: Callable[[int], None] = lambda images: None) -> list[Entry]:
        """Measure every point; returns the entries, by EMA decay and then by omega.

        `work` keeps finished entries and the features of the current point: a killed sweep goes on from
        there. Where `hardware.png_folder` keeps samples, a point whose files are missing is made again, and
        files of another run (`work` has another name) are removed. `on_images` receives how many samples all
        processes have made, if they keep pace.
        """
        ranks, entries = self.ranks, []
        file = work / _FINISHED
        finished = ranks.from_first(json.loads(file.read_text()) if file.exists() else {})
        for decay, omega in product(self.decays, self.settings.fid.omegas):
            made = len(entries) * len(self.labels)
            name = f"{decay}-{omega}"
            png = self._png_folder(decay, omega, work.name)
            entry = finished.get(name)
            if entry is None or (png is not None and not png.finished):
                features = work / f"samples-{name}"
                store = self._sample(decay, omega, features, png, lambda n, made=made: on_images(made + n))
                if ranks.first:  # the metrics take one machine's cores as they are
                    entry = {"omega": omega, "ema_decay": decay, **self._measure(store)}
                    if png is not None:
                        entry["dir"] = str(png.folder)
                        png.finish(entry)
                    finished[name] = entry
                    write_json(file, finished)
                    shutil.rmtree(features)
                entry = ranks.from_first(entry)
            entries.append(entry)
            on_images(made + len(self.labels))
        return entries

    def _png_folder(self, decay: float | None, omega: float, run: str) -> PngFolder | None:
        root = self.settings.hardware.png_folder
        if root is None:
            return None
        folder = PngFolder(Path(root), omega, decay if len(self.decays) > 1 else None)
        if self.ranks.first:
            folder.claim(run)
        self.ranks.barrier()
        return folder

    def _sample(
        self,
        decay: float | None,
        omega: float,
        folder: Path,
        png: PngFolder | None,
        on_images: Callable[[int], None],
    ) -> FeatureStore:
        """The features of all samples of one point, of which `folder` has some; writes the PNG files too."""
        generator, network, labels = self.load(decay), self.network, self.labels
        seed, batch_size = self.settings.seed, self.settings.hardware.sample_batch

        def images(rows: np.ndarray) -> Tensor:
            wanted = [(int(labels[row]), int(row), omega) for row in rows]
            return draw_images(generator, self.decode, wanted, seed, batch_size)

        def resized(rows: np.ndarray, images: Tensor) -> tuple[Tensor, None]:
            writing = () if png is None else network.pool.map(png.write, rows.tolist(), images.numpy())
            pixels = network.resized(images)
            list(writing)  # to the end, and raises what a thread has met
            return pixels, None

        store = FeatureStore.create(folder, len(labels), network.dimension, self.ranks)
        missing = store.missing()
        if png is not None:
            missing = np.union1d(missing, png.missing(len(labels)))
        how = {"batch_size": batch_size, "ranks": self.ranks, "on_images": on_images}
        measure_rows(store, missing, network, images, resized, **how)
        return store

    def _measure(self, store: FeatureStore) -> Entry:
        """What one point of the sweep has of `COLUMNS`."""
        network, fid, seed = self.network, self.settings.fid, self.settings.seed
        statistics, real = store_statistics(store, network, self.labels), self.reference.features
        entry: Entry = {"fid": statistics.distance(self.reference.statistics)}
        if "inception_score" in fid.metrics:
            logits = ((rows, network.logits(block)) for rows, block in store.blocks())
            entry["inception_score"], entry["inception_score_std"] = inception_score(logits, len(store), seed)
        if real is not None and "kid" in fid.metrics:
            entry["kid"] = kernel_distance(real, store, seed)
        if real is not None and "precision_recall" in fid.metrics:
            count = fid.precision_recall_images
            found = precision_recall(store, real, count, network.device, seed=seed)
            entry["precision"], entry["recall"] = found
        if statistics.accuracy is not None:
            entry["accuracy"] = statistics.accuracy
        return entry
