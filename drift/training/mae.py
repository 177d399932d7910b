"""Training of the latent-MAE (paper A.3): masked reconstruction, then a short phase with a class loss."""

from pathlib import Path

import torch
import torch.nn.functional as F

from drift.data.latents import LatentStore
from drift.data.queue import batch_rows
from drift.launch import Ranks
from drift.models.ema import EMA
from drift.models.mae import LatentMAE, MAEConfig, draw_mask
from drift.params import Hardware, Mae
from drift.seeds import derive_seed, torch_generator
from drift.training.loop import autocast, train

PLOT_COLUMNS = ("loss", "reconstruction", "accuracy", "grad_norm", "lr")


def mae_config(options: Mae, store: LatentStore) -> MAEConfig:
    """Sizes of the MAE of `options` for the latents of `store`."""
    return MAEConfig(
        in_channels=store.shape[1],
        base_channels=options.width,
        layers=options.layers,
        patch_size=options.mask_patch,
        num_classes=store.num_classes,
        norm_groups=options.norm_groups,
    )


def class_share(step: int, options: Mae) -> float:
    """Share lambda of the class loss at `step`: 0, then a ramp to `finetune_weight` (paper A.3)."""
    into = step - (options.steps - options.finetune_steps)
    if into < 0:
        return 0.0
    return options.finetune_weight * min(1.0, (into + 1) / max(1, options.finetune_ramp_steps))


def train_mae(
    store: LatentStore, options: Mae, *, seed: int, hardware: Hardware, ranks: Ranks, folder: Path
) -> tuple[LatentMAE, list[EMA]]:
    """Train a LatentMAE on `store`, going on from the checkpoint in `folder` if there is one.

    Each step minimises `lambda * cross entropy + (1 - lambda) * masked L2`. The statistics are of the whole
    batch: `loss`, `reconstruction` (masked L2 per element) and `accuracy` of the class head, which learns
    nothing while lambda is 0. Raises `UserError` if the batch does not split over the processes.
    """
    mine = ranks.share(options.batch_size, "mae.batch_size")
    torch.manual_seed(derive_seed(seed, "mae/init"))
    model = LatentMAE(mae_config(options, store)).to(ranks.device)
    network = torch.compile(model) if hardware.compile else model
    grid = model.mask_grid(*store.shape[2:])

    def compute(step: int):
        rows = batch_rows(step, options.batch_size, len(store), seed)[mine]
        latents = store.rows(rows).to(ranks.device)  # [B, C, H, W]
        labels = torch.from_numpy(store.labels[rows]).to(ranks.device)
        mask = draw_mask(
            (options.batch_size, *grid), options.mask_ratio, torch_generator(seed, "mae/mask", step)
        )[mine].to(ranks.device)
        with autocast(ranks, hardware.precision):
            per_sample, logits = network(latents, mask)
            reconstruction, entropy = per_sample.mean(), F.cross_entropy(logits, labels)
        share = class_share(step, options)
        loss = share * entropy + (1 - share) * reconstruction
        correct = (logits.argmax(1) == labels).float().mean()
        means = torch.stack([loss.detach(), reconstruction.detach(), correct])
        means = ranks.sum(means) / ranks.world_size
        return loss, dict(zip(("loss", "reconstruction", "accuracy"), means, strict=True))

    emas = train(
        model,
        compute,
        options=options,
        ema_decays=[options.ema_decay],
        hardware=hardware,
        ranks=ranks,
        folder=folder,
        what="mae",
    )
    return model, emas
