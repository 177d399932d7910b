"""Metrics of a generator's samples, over a sweep of the CFG strength omega and of its EMA copies.

Features are written to disk as they come, a row per sample; all metrics are made from that file. So neither
batch size nor number of processes shows in them, memory does not grow with the number of images, and a sweep
that is killed goes on at the first sample that is not there.
"""

import csv
import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drift.evaluation.batches import one_behind
from drift.evaluation.metrics import InceptionScore, kernel_distance, precision_recall
from drift.evaluation.networks import FeatureNetwork
from drift.evaluation.png import PngFolder, png_folder_name
from drift.evaluation.reference import Peers, Reference, require_enough, store_statistics
from drift.evaluation.sample import ImageDecoder, sample_images
from drift.evaluation.store import FeatureStore
from drift.models.generator import Generator
from drift.runtime.errors import UserError, one_of
from drift.runtime.files import atomic_write

Entry = dict[str, Any]
"""One point of the sweep: omega, ema_decay, fid, and those of the other `VALUES` that were measured."""
VALUES = ("fid", "kid", "inception_score", "inception_score_std", "precision", "recall", "accuracy")
COLUMNS = ("omega", "ema_decay", *VALUES, "dir")
METRICS = ("kid", "inception_score", "precision_recall")
"""What can be measured beside the Fréchet distance."""


@dataclass(frozen=True)
class Samples:
    """Which samples are measured, and how they are made."""

    labels: np.ndarray  # [N]
    seed: int
    batch_size: int
    """Samples that are generated and measured at once, per process; decides no number."""
    device: str | torch.device = "cpu"

    def __len__(self) -> int:
        return len(self.labels)


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
    load: Callable[[float | None], Generator],
    decode: ImageDecoder,
    network: FeatureNetwork,
    reference: Reference,
    samples: Samples,
    *,
    ema_decays: Sequence[float | None],
    omegas: Sequence[float],
    metrics: Sequence[str],
    work: Path,
    precision_recall_images: int = 10_000,
    png: Path | None = None,
    run: str = "",
    writers: int = 1,
    peers: Peers = Peers(),  # noqa: B008 (frozen)
    finished: Sequence[Entry] = (),
    on_entry: Callable[[Entry], None] = lambda entry: None,
    on_images: Callable[[int], None] = lambda images: None,
) -> list[Entry]:
    """Measure the same samples of every EMA copy (`load` gives the generator) at every CFG strength.

    Returns the entries, the same on every process, by EMA decay and then by omega. `work` is the folder of
    the features while they are needed. `png` is where PNG files of the samples are kept, in folders
    `gen_omega_<w>/`, by `writers` threads; None keeps none. `run` names what decides the samples: what
    another run has left in these folders is removed.

    `finished` has the entries of an interrupted sweep, which are not measured again unless their PNG files
    are missing; `on_entry` sees each new one, and `on_images` after each batch how many samples of the whole
    sweep all processes have made, if they keep pace. Raises `UserError` if there are too few samples for the
    network's features, or what `check_metrics` does.
    """
    require_enough(len(samples), network, "generated images per omega (fid.images)")
    check_metrics(metrics, network, reference.features is not None)
    known = {(entry["ema_decay"], entry["omega"]): entry for entry in finished}
    sweep: list[Entry] = []
    with ThreadPoolExecutor(max(1, writers)) as pool:
        for decay in ema_decays:
            for omega in omegas:
                folder = None
                if png is not None:
                    folder = PngFolder(png / png_folder_name(omega, decay, len(ema_decays) > 1), pool)
                    if peers.first:
                        folder.claim(run)
                    peers.wait()
                entry = known.get((decay, omega))
                if entry is None or (folder is not None and not folder.finished):
                    before = len(sweep) * len(samples)
                    store = _generate(
                        load(decay),
                        decode,
                        network,
                        samples,
                        omega,
                        work / f"samples-{_text(decay)}-{omega:g}",
                        folder,
                        peers,
                        lambda made, before=before: on_images(before + made),
                    )
                    measured = _measure(
                        store, network, reference, samples, metrics, precision_recall_images, peers
                    )
                    entry = {"omega": omega, "ema_decay": decay, **measured}
                    if folder is not None:
                        entry["dir"] = str(folder.folder)
                        if peers.first:
                            folder.finish(entry)
                    on_entry(entry)
                    if peers.first:
                        shutil.rmtree(work / f"samples-{_text(decay)}-{omega:g}")
                sweep.append(entry)
                on_images(len(sweep) * len(samples))
    return sweep


def _text(decay: float | None) -> str:
    return "none" if decay is None else f"{decay:g}"


def _generate(
    generator: Generator,
    decode: ImageDecoder,
    network: FeatureNetwork,
    samples: Samples,
    omega: float,
    work: Path,
    folder: PngFolder | None,
    peers: Peers,
    on_images: Callable[[int], None],
) -> FeatureStore:
    """The features of all samples, made by all processes; those that are there already are not made again."""
    if peers.first:
        FeatureStore.create(work, len(samples), network.dimension)
    peers.wait()
    store = FeatureStore(work)
    missing = store.missing()
    if folder is not None:
        missing = np.union1d(missing, folder.missing(len(samples)))
    peers.wait()  # nobody writes before everybody has looked
    mine = np.array_split(missing, peers.world_size)[peers.rank]
    before, made = len(samples) - len(missing), 0
    batches = sample_images(
        generator,
        decode,
        mine,
        samples.labels,
        omega,
        samples.seed,
        samples.batch_size,
        device=samples.device,
        progress=peers.first,
    )
    for (indices, images), resized in one_behind(batches, lambda batch: network.resized(batch[1])):
        if folder is not None:
            folder.add(indices, images)
        features = network.features(resized).cpu().numpy()
        if folder is not None:
            folder.wait()
        store.write(indices, features)
        made += len(indices)
        on_images(min(before + made * peers.world_size, len(samples)))
    peers.wait()
    return store


def _measure(
    store: FeatureStore,
    network: FeatureNetwork,
    reference: Reference,
    samples: Samples,
    metrics: Sequence[str],
    precision_recall_images: int,
    peers: Peers,
) -> Entry:
    """What one point of the sweep has of `VALUES`, the same on every process."""
    score: InceptionScore | None = None

    def also(rows: torch.Tensor, logits: torch.Tensor) -> None:
        if score is not None:
            score.update(rows, logits)

    if "inception_score" in metrics:
        classes = network.logits(torch.zeros(1, network.dimension, device=network.device)).shape[1]
        score = InceptionScore(len(samples), classes, network.device, seed=samples.seed)
    statistics = store_statistics(store, network, samples.labels, peers, also)
    entry: Entry = {}
    if score is not None:
        entry["inception_score"], entry["inception_score_std"] = score.compute(peers.all_reduce_sum)
    if statistics.accuracy is not None:
        entry["accuracy"] = statistics.accuracy
    names = ["fid"]
    names += ["kid"] if "kid" in metrics else []
    names += ["precision", "recall"] if "precision_recall" in metrics else []
    values: list[float] = []
    if peers.first:  # these take one machine's cores as they are
        values.append(statistics.distance(reference.statistics))
        if "kid" in metrics:
            values.append(kernel_distance(reference.features, store, samples.seed))
        if "precision_recall" in metrics:
            values += precision_recall(
                store, reference.features, precision_recall_images, network.device, seed=samples.seed
            )
    told = torch.tensor(values or [0.0] * len(names), dtype=torch.float64, device=peers.device)
    return entry | dict(zip(names, peers.all_reduce_sum(told).tolist(), strict=True))


def best_entry(sweep: Sequence[Entry]) -> Entry:
    """The entry of the lowest Fréchet distance."""
    return min(sweep, key=lambda entry: entry["fid"])


def write_sweep_csv(path: str | Path, sweep: Sequence[Entry]) -> None:
    """Write the entries of a sweep atomically as CSV: `COLUMNS`, of which the prior has omega, fid and dir.

    What was not measured is empty.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sweep)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def sweep_summary(
    sweep: Sequence[Entry],
    *,
    generator: str,
    images: int,
    batch_size: int,
    workers: int,
    mode: str,
    reference: str,
    statistics: str,
    latent_scale_factor: float,
) -> Mapping[str, Any]:
    """What `fid_sweep.json` holds: the prior's fields, with ours in each entry of `results`."""
    return {
        "ckpt": generator,
        "use_ema": True,
        "num_gen": images,
        "batch_size": batch_size,
        "fid": {"mode": mode, "batch_size": batch_size, "workers": workers},
        "real_dir": reference,
        "real_stats": statistics,
        "latent_scale_factor": latent_scale_factor,
        "omegas": list(dict.fromkeys(entry["omega"] for entry in sweep)),
        "results": [{"dir": None, **entry} for entry in sweep],
        "best": {"dir": None, **best_entry(sweep)},
    }
