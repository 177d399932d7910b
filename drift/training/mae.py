"""Training of the latent-MAE (paper A.3): masked reconstruction, then a short phase with a class loss.

The masked error in the log, in plots and in `drift inspect mae` is the term of the loss: the squared error
per masked position, summed over channels. A network that knows only the mean of each of C channels of
variance one has an error of C.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from drift.data.bank import batch_rows, held_out_rows
from drift.data.latents import LatentReader, LatentStore, pinned
from drift.models.base import CONFIG_FILE
from drift.models.ema import EMA
from drift.models.mae import LatentMAE, draw_mask
from drift.runtime.errors import UserError
from drift.runtime.progress import read_log
from drift.runtime.seeds import derive_seed, torch_generator
from drift.settings import Mae
from drift.training.log import Tree
from drift.training.loop import LOG_FILE, Measured, Run, Task, autocast, parts, train

PLOT_COLUMNS = ("loss", "reconstruction", "accuracy", "grad_norm", "lr")
HELD_OUT_COLUMNS = ("held_out",)
SOURCE_IMAGES = 1000


def mae_config(options: Mae, store: LatentStore) -> dict[str, Any]:
    """Sizes of the MAE for the latents of `store`."""
    return {
        "in_channels": store.shape[1],
        "base_channels": options.width,
        "layers": options.layers,
        "patch_size": options.mask_patch,
        "input_patch_size": options.input_patch_size,
        "num_classes": store.num_classes,
        "norm_groups": options.norm_groups,
    }


def class_share(step: int, options: Mae) -> float:
    """Share lambda of the class loss: 0, then a ramp to `finetune_weight` (paper A.3)."""
    into = step - (options.steps - options.finetune_steps)
    if into < 0:
        return 0.0
    ramp = options.finetune_ramp_steps
    return options.finetune_weight * (min(1.0, into / ramp) if ramp else 1.0)


def mae_loss(
    network: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    latents: Tensor,
    mask: Tensor,
    labels: Tensor,
    share: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The training loss, a mean over samples; its reconstruction term; and the logits of the class head.

        loss = share * cross entropy + (1 - share) * masked error

    `network` is a `LatentMAE`, whose `forward` defines the masked error; `labels` are `[B]`.
    """
    per_sample, logits = network(latents, mask)
    reconstruction = per_sample.mean()
    loss = share * F.cross_entropy(logits, labels) + (1 - share) * reconstruction
    return loss, reconstruction, logits


class Batch(NamedTuple):
    """This process's share of a batch, with latents as `LatentReader.fetch` gives them."""

    latents: Tensor
    labels: Tensor
    """`[B]`"""
    masks: Tensor
    """`[B, h, w]`"""
    share: float
    """Of the class loss."""


class MAETraining(Task[Batch]):
    """The mae stage. `options.held_out` images are never trained on, and measure the encoder."""

    name = "mae"
    model: LatentMAE
    options: Mae

    def __init__(self, store: LatentStore, options: Mae, run: Run):
        self.options, self.ema_decays, self._store, self._run = options, [options.ema_decay], store, run
        self._mine = run.ranks.share(options.batch_size, "mae.batch_size")
        self.count, self.at_once = self._mine.stop - self._mine.start, run.hardware.mae_micro_batch
        self._reader = LatentReader(store, run.ranks.device, on_device=run.hardware.latents_on_device)
        self._held_out = held_out_rows(len(store), store.per_image, options.held_out, run.seed)
        self._rows = np.setdiff1d(np.arange(len(store)), self._held_out, assume_unique=True)
        self.evaluate_every = options.evaluate_every if len(self._held_out) else None
        torch.manual_seed(derive_seed(run.seed, "mae/init"))
        self.model = LatentMAE(**mae_config(options, store))

    def prepare(self, step: int) -> Batch:
        """Read latents and draw masks, as a function of (seed, step)."""
        options, device = self.options, self._run.ranks.device
        rows = batch_rows(step, options.batch_size, len(self._rows), self._run.seed)
        rows = self._rows[rows[self._mine]]
        grid = self.model.mask_grid(*self._store.shape[2:])
        generator = torch_generator(self._run.seed, "mae/mask", step)
        masks = draw_mask((options.batch_size, *grid), options.mask_ratio, generator)[self._mine]
        labels = torch.from_numpy(self._store.labels[rows])
        share = class_share(step, options)
        return Batch(self._reader.fetch(rows), pinned(labels, device), pinned(masks, device), share)

    def loss(self, network: nn.Module, batch: Batch, part: slice, totals: None) -> tuple[Tensor, Tree]:
        """`mae_loss` of some latents."""
        ranks = self._run.ranks
        labels, masks = (x[part].to(ranks.device, non_blocking=True) for x in (batch.labels, batch.masks))
        latents = self._reader.place(batch.latents[part])
        with autocast(ranks, self.options.precision):
            loss, reconstruction, logits = mae_loss(network, latents, masks, labels, batch.share)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return loss, {"reconstruction": reconstruction, "accuracy": accuracy}

    def evaluate(self, done: int, weights: Mapping[str, Tensor]) -> Measured:
        """The masked error on the held-out images."""
        error = masked_error(self.model, weights, self._reader, self._held_out, self.options, self._run)
        return Measured({"held_out": error})


def train_mae(store: LatentStore, options: Mae, run: Run) -> tuple[LatentMAE, list[EMA]]:
    """Train a LatentMAE on `store` by `mae_loss`, from the newest checkpoint on.

    The log has the mean `loss`, `reconstruction` (the masked error) and `accuracy` of the class head, which
    learns nothing while `class_share` is 0. With `options.held_out`, `held_out` is the masked error of the
    EMA weights on images that are never trained on. Raises `UserError` if the batch does not split over the
    processes, or nothing is left to train on.
    """
    training = MAETraining(store, options, run)
    return training.model, train(training, run)


@torch.no_grad()
def masked_error(
    model: LatentMAE,
    weights: Mapping[str, Tensor],
    reader: LatentReader,
    rows: np.ndarray,
    options: Mae,
    run: Run,
) -> Tensor:
    """The mean masked error, a scalar, of `model` with `weights` over `rows` of the latents.

    A row has the same mask every time, in whichever process.
    """
    ranks = run.ranks
    mine, total = rows[ranks.rank :: ranks.world_size], torch.zeros((), device=ranks.device)
    for part in parts(len(mine), run.hardware.mae_micro_batch or options.batch_size):
        latents = reader.place(reader.fetch(mine[part]))
        grid = model.mask_grid(*latents.shape[2:])
        generators = (torch_generator(run.seed, "mae/held_out", int(row)) for row in mine[part])
        masks = torch.cat([draw_mask((1, *grid), options.mask_ratio, generator) for generator in generators])
        with autocast(ranks, options.precision):
            per_sample, _ = functional_call(model, dict(weights), (latents, masks.to(ranks.device)))
        total += per_sample.sum()
    return ranks.sum(total) / len(rows)


def open_encoder(source: str, store: LatentStore) -> LatentMAE:
    """The encoder in the folder `source`.

    Raises `UserError` if it is missing, damaged, or for latents with other channels than those of `store`.
    """
    if not Path(source, CONFIG_FILE).is_file():
        raise UserError(
            f"mae.source = {source}: there is no {CONFIG_FILE} in it; name the folder of an encoder from the "
            "stage mae, drift import-release or drift import-sinkhorn"
        )
    model = LatentMAE.from_pretrained(source)
    if (channels := model.config["in_channels"]) != store.shape[1]:
        raise UserError(
            f"mae.source = {source}: an encoder of {channels} channels, but the latents in {store.folder} "
            f"have {store.shape[1]}; name another"
        )
    return model


def adopt_encoder(
    model: LatentMAE, source: Path, store: LatentStore, options: Mae, run: Run
) -> tuple[LatentMAE, list[EMA]]:
    """What stands in for `train_mae` where there is a `source`: its model, measured on the latents.

    The log is that of the source and one more line: the error on the held-out images, or on `SOURCE_IMAGES`
    where the settings hold none out.
    """
    ranks = run.ranks
    count = min(options.held_out or SOURCE_IMAGES, len(store) // store.per_image - 1)
    rows = held_out_rows(len(store), store.per_image, count, run.seed)
    reader = LatentReader(store, ranks.device, on_device=False)
    weights = {name: weight.to(ranks.device) for name, weight in model.state_dict().items()}
    error = float(masked_error(model, weights, reader, rows, options, run))
    if ranks.first:
        print(f"mae: masked error of {source} on {len(rows)} latents: {error:.4g}", flush=True)
        log = read_log(source / LOG_FILE)
        lines = [*log, {"step": log[-1]["step"] if log else 0, "held_out": error}]
        (run.folder / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return model, [EMA(model, 0.0)]
