"""The Fréchet distance of a generator while it trains: the numbers of the stage fid, of fewer images."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from drift.data.latents import LatentStore
from drift.evaluation.measurement import Measurement
from drift.evaluation.reference import self_test
from drift.evaluation.sweep import Sweep
from drift.models.base import WEIGHTS_FILE, share_weights
from drift.models.generator import Generator
from drift.runtime.files import replace_folder, write_json
from drift.runtime.processes import Ranks
from drift.settings import Settings
from drift.training.loop import Measured

BEST = "best"
"""Folder, beside the checkpoints, of the generator with the smallest distance so far."""
EVALUATION_FILE = "evaluation.json"
FID_COLUMNS = ("fid", "omega")
"""Of the lines of `logs.jsonl` that evaluations write, for DVC's plot."""
_SIDE = 8  # rows and columns of the picture at most


class _Weighted:
    """A generator that computes with other weights than its own."""

    def __init__(self, generator: Generator, weights: Mapping[str, Tensor]):
        self.config, self.device = generator.config, generator.device
        self._generator, self._weights = generator, dict(weights)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return functional_call(self._generator, self._weights, inputs)


class TrainingEvaluation(Measurement):
    """Samples of a generator in training, measured as the section `fid` says.

    `drift.evaluate_images` and `drift.evaluate_omegas` take the place of `fid.images` and `fid.omegas`.
    Construct it before processes are started, and call `start` in each.
    """

    def __init__(self, settings: Settings, store: LatentStore):
        """`store` holds the real samples; what is generated has their shape.

        Raises `UserError` for everything that can be known to fail before the work.
        """
        images, omegas = settings.drift.evaluate_images, settings.drift.evaluate_omegas
        changes = {"images": images, "omegas": omegas, "metrics": ()}
        classes, columns = settings.fid.picture_classes, settings.fid.picture_columns
        changes |= {"picture_classes": min(classes, _SIDE), "picture_columns": min(columns, _SIDE)}
        fid = settings.fid.model_copy(update=changes)
        hardware = settings.hardware.model_copy(update={"png_folder": None})
        changed = settings.model_copy(update={"fid": fid, "hardware": hardware})
        super().__init__(changed, store.folder, store.shape[1:], "drift.evaluate_images")

    def start(self, ranks: Ranks, folder: Path) -> None:
        """Move the networks to the device, and measure the reference; `folder` is that of the run.

        Raises `UserError` if the reference is no good.
        """
        self._ranks, self._folder = ranks, folder
        self._decode = self.decoder(ranks)
        self._reference = self.reference(ranks)
        if ranks.first:
            self_test(self._reference, self.settings.seed)

    def __call__(self, generator: Generator, weights: Mapping[str, Tensor], done: int) -> Measured:
        """Measure `generator` with `weights`, after so many steps; the best so far becomes `BEST`.

        The numbers are those of the omega with the smallest `fid`; of several, each has its `fid_<omega>`.
        """
        ranks, fid, work = self._ranks, self.settings.fid, self._folder / "evaluation"
        if ranks.first:
            shutil.rmtree(work, ignore_errors=True)  # of other weights, if a kill has left it
        ranks.barrier()
        weighted = cast(Generator, _Weighted(generator, weights))
        what = {"settings": self.settings, "labels": self.labels, "decays": (None,), "ranks": ranks}
        how = {"decode": self._decode, "network": self.network, "reference": self._reference}
        sweep = Sweep(load=lambda decay: weighted, **what, **how)
        bar = {"desc": f"fid after step {done}", "unit": "image", "leave": False, "disable": not ranks.first}
        with tqdm(total=len(fid.omegas) * fid.images, mininterval=1.0, **bar) as shown:

            def reached(images: int) -> None:
                shown.update(images - shown.n)

            entries = sweep.run(work, reached)
        best = min(entries, key=lambda entry: entry["fid"])
        numbers = {name: best[name] for name in (*FID_COLUMNS, "accuracy") if name in best}
        if len(entries) > 1:
            numbers |= {f"fid_{entry['omega']:g}": entry["fid"] for entry in entries}
        if not ranks.first:
            return Measured(numbers)
        shutil.rmtree(work, ignore_errors=True)
        self._keep(generator, weights, {"done": done, **numbers})
        columns = [(column, best["omega"]) for column in range(fid.picture_columns)]
        return Measured(numbers, self.grid(weighted, self._decode, columns))

    def _keep(self, generator: Generator, weights: Mapping[str, Tensor], measured: dict[str, Any]) -> None:
        """Write the folder `BEST` if `measured` is the smallest distance by this protocol."""
        fid, best = self.settings.fid, self._folder / BEST
        protocol = {"images": fid.images, "omegas": list(fid.omegas), "seed": self.settings.seed}
        protocol |= {"features": self.network.digest, "reference": self._reference.digest}
        if (file := best / EVALUATION_FILE).exists():
            before = json.loads(file.read_text())
            if before["protocol"] == protocol and before["fid"] <= measured["fid"]:
                return
        draft = self._folder / f"{BEST}-draft"
        shutil.rmtree(draft, ignore_errors=True)
        generator.save_config(draft)
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(tensors, draft / WEIGHTS_FILE, metadata={"format": "pt"})
        share_weights(draft)
        write_json(draft / EVALUATION_FILE, {**measured, "protocol": protocol})
        replace_folder(draft, best)
