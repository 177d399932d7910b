"""The training objective of the generator: the drifting loss, summed over the encoder's feature sets."""

from typing import Protocol

import torch
from torch import Tensor

from drift.field.loss import Reduce, drifting_loss
from drift.field.settings import FieldSettings


class FeatureEncoder(Protocol):
    """Anything with the `encode` of `drift.models.mae.LatentMAE`."""

    def encode(self, latents: Tensor, drop_duplicates: bool = False) -> dict[str, Tensor]:
        """Latents `[B, C, H, W]` -> feature sets `[B, L_j, C_j]` by name."""


def drift_objective(
    generated: Tensor,
    positives: Tensor,
    unconditional: Tensor,
    omega: Tensor,
    encoder: FeatureEncoder,
    settings: FieldSettings,
    *,
    negatives: Tensor | None = None,
    reduce: Reduce | None = None,
    drop_duplicates: bool = False,
) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    """Sum over feature sets of the drifting loss (paper A.5, A.6).

        L = sum_j loss_j,  j over the encoder's feature sets and `global`, the whole latent as one vector

    Args:
        generated: latents of the generator `[Nc, N, C, H, W]`; the loss can be differentiated in them.
        positives: latents of real samples of the same class, `[Nc, P, C, H, W]`.
        unconditional: latents of real samples of any class, `[Nc, U, C, H, W]`; U may be 0.
        omega: CFG strength of each class, `[Nc]`.
        encoder: the frozen feature encoder.
        settings: the knobs of the field.
        negatives: for `settings.negatives: second_batch`, latents of other generated samples of the same
            class, `[Nc, K, C, H, W]`.
        reduce: sums over the processes that share the classes of a step, see `drifting_loss`.
        drop_duplicates: leave out feature sets that repeat another one whatever the values are. The
            release keeps them, so that those count twice.

    Returns:
        The loss, and by feature set the statistics of `drifting_loss`.

    Raises:
        UserError, ValueError: see `drifting_loss`.
    """
    # What nothing is learned through: [Nc, P+U(+K), C, H, W]
    given = [positives, unconditional, *([] if negatives is None else [negatives])]
    classes, fixed = len(generated), torch.cat(given, dim=1).detach()
    with torch.no_grad():
        fixed_features = encoder.encode(fixed.flatten(0, 1), drop_duplicates=drop_duplicates)
    fixed_features["global"] = fixed.flatten(0, 1).flatten(1)[:, None]
    features = encoder.encode(generated.flatten(0, 1), drop_duplicates=drop_duplicates)
    features["global"] = generated.flatten(0, 1).flatten(1)[:, None]

    losses, statistics = [], {}
    for name, x in features.items():
        pos, uncond, *repelling = (
            fixed_features.pop(name)  # a set that is done makes room for the next
            .unflatten(0, (classes, -1))
            .split([samples.shape[1] for samples in given], dim=1)
        )
        loss, statistics[name] = drifting_loss(
            x.unflatten(0, (classes, -1)),
            pos,
            uncond,
            omega,
            settings,
            negatives=repelling[0] if repelling else None,
            reduce=reduce,
        )
        losses.append(loss)
    return torch.stack(losses).sum(), statistics
