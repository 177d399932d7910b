"""The MAE: what it makes of masked latents."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from drift.data.bank import held_out_rows
from drift.data.latents import LatentStore
from drift.evaluation.inspection import WAY_OUT, Latents, Look, bands, prepare_out, write_inspection
from drift.models.base import model_files
from drift.models.mae import LatentMAE, draw_mask
from drift.runtime.errors import UserError
from drift.runtime.files import sha256
from drift.runtime.seeds import torch_generator
from drift.runtime.work import SETTINGS_FILE, settings_in_force
from drift.runtime.yaml_files import read_yaml
from drift.settings import Mae, Settings

_BATCH = 32  # latents that the MAE sees at once
_MASKING = ("held_out", "mask_ratio")  # of the settings of the MAE, beside the seed
_GREY = 128  # what is masked


@torch.inference_mode()
def fill_in(
    model: LatentMAE, latents: Tensor, rows: np.ndarray, ratio: float, seed: int, what: str
) -> tuple[Tensor, Tensor]:
    """What is hidden of `latents [n, C, H, W]`, bool `[n, 1, H, W]`, and what the MAE makes of the rest.

    The mask of a row is a function of (seed, what, row).
    """
    grid = model.mask_grid(*latents.shape[2:])
    mask = torch.cat([draw_mask((1, *grid), ratio, torch_generator(seed, what, int(row))) for row in rows])
    side = model.patch_size * model.input_patch_size
    hidden = mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]
    device = next(model.parameters()).device
    seen = latents.masked_fill(hidden, 0).split(_BATCH)
    filled = [model.unfold(model.reconstruct(part.to(device))[0]).float().cpu() for part in seen]
    return hidden, torch.cat(filled)


def masked_errors(latents: Tensor, output: Tensor, hidden: Tensor, fold: int = 1) -> Tensor:
    """The error of `output` for each latent, `[n]`, as the stage mae computes and logs it.

    The squared error summed over channels and hidden places, over the number of these places; `fold` is the
    side of what counts as one place, the MAE's `input_patch_size`.
    """
    places = hidden.sum((1, 2, 3)).clamp(min=1) / fold**2
    return ((latents - output).square() * hidden).sum((1, 2, 3)) / places


def _measure(model: LatentMAE, store: LatentStore, rows: np.ndarray, settings: Settings) -> dict[str, float]:
    """The mean error of `rows`, and what it would be if the MAE knew nothing but each channel's mean."""
    latents = store.rows(rows)
    hidden, output = fill_in(model, latents, rows, settings.mae.mask_ratio, settings.seed, "mae/held_out")
    means = latents.mean(dim=(0, 2, 3))[:, None, None]
    fold = model.input_patch_size
    error, of_means = (float(masked_errors(latents, guess, hidden, fold).mean()) for guess in (output, means))
    return {"error": error, "of_means": of_means, "rows": len(rows)}


def _training_warnings(folder: Path, model: LatentMAE, settings: Settings) -> list[str]:
    """Whether the MAE's weights are finite; and whether it was trained with the settings' masks and held-out
    images, as far as is known."""
    warnings = []
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        warnings.append(f"{folder}: some of its weights are not finite: train it again")
    path = folder / SETTINGS_FILE
    trained = settings_in_force(read_yaml(path, WAY_OUT)) if path.exists() else None
    if trained is None or trained["mae"].get("source"):  # from elsewhere
        return warnings
    # Older files say only what differs from the defaults
    of_mae = {key: trained["mae"].get(key, getattr(Mae(), key)) for key in _MASKING}
    then = {"seed": trained["seed"], **{f"mae.{key}": value for key, value in of_mae.items()}}
    now = {"seed": settings.seed, **{f"mae.{key}": getattr(settings.mae, key) for key in _MASKING}}
    if differing := ", ".join(f"{key} was {then[key]}" for key in now if then[key] != now[key]):
        warnings.append(
            f"{folder} was trained with other masks or held-out images than these settings have "
            f"({differing}): those called held out here were not, and its log differs"
        )
    return warnings


def inspect_mae(
    folder: str | Path,
    latents: str | Path,
    settings: Settings,
    out: str | Path,
    look: Look = Look(count=8),  # noqa: B008 (frozen)
    *,
    rows: int = 1024,
) -> list[str]:
    """Show what the MAE of `folder` makes of masked `latents`, and measure it; returns the lines to print.

    Writes `mae.png` and `meta.json` into `out`. From above, the picture has the source image (with
    `look.images`), the decoded latent, the same with what is masked in grey, with that filled in, and the
    output alone; of held-out images if there are any. The masked error is that of at most `rows` latents of
    held-out images and of as many others. Raises what `inspect_latents` does, and `UserError` if the MAE is
    not one for these latents.
    """
    folder, options = Path(folder), settings.mae
    model = LatentMAE.from_pretrained(folder)
    nn.Module.to(model, look.device)
    warnings = _training_warnings(folder, model, settings)
    found = Latents(latents, settings, look)
    store, parts = found.store, _parts(found.store, settings)
    require_fit(folder, model, store)
    out = prepare_out(out, latents, folder)

    errors = {
        name: _measure(model, store, found.choose(part, rows, "inspect/rows"), settings)
        for name, part in parts.items()
    }

    shown = found.choose(next(iter(parts.values())), look.count, "inspect/mae")
    meta = {
        "mae": {"folder": str(folder), "sha256": {path.name: sha256(path) for path in model_files(folder)}},
        **found.described(shown),
        "settings": {"count": look.count, "seed": look.seed, "rows": rows, "mask_ratio": options.mask_ratio},
        "masked_error": errors,
    }
    grid = _picture(found, model, options.mask_ratio, look.seed, meta["shown"])
    lines = [
        f"mae:          {folder}, width {model.config['base_channels']}",
        f"latents:      {store.folder}",
    ]
    lines += [
        f"masked error: {of['error']:.4f} of {of['rows']} latents ({name}); "
        f"the channels' means: {of['of_means']:.4f}"
        for name, of in errors.items()
    ]
    return write_inspection(out, {"mae.png": grid}, meta, lines, warnings + _doubts(errors))


def _parts(store: LatentStore, settings: Settings) -> dict[str, np.ndarray]:
    """The rows of held-out images, if there are any, and the others."""
    # What an encoder from elsewhere has seen is unknown
    count = settings.mae.held_out if settings.mae.source is None else 0
    held_out = held_out_rows(len(store), store.per_image, count, settings.seed)
    others = np.setdiff1d(np.arange(len(store)), held_out, assume_unique=True)
    return {"held out": held_out, "others": others} if count else {"others": others}


def require_fit(folder: Path, model: LatentMAE, store: LatentStore) -> None:
    """Raises `UserError` if the MAE of `folder` is not one for the latents of `store`."""
    channels = model.config["in_channels"]
    if channels != store.shape[1]:
        raise UserError(
            f"{folder}: an MAE of {channels} channels, but {store.folder} has latents of {store.shape[1]}; "
            "name latents and MAE that belong together"
        )
    model.mask_grid(*store.shape[2:])


def _picture(
    found: Latents, model: LatentMAE, ratio: float, seed: int, shown: Sequence[dict[str, Any]]
) -> Image.Image:
    """What the MAE makes of the latents that `shown` describes, to which their masked errors are added."""
    rows = np.array([one["row"] for one in shown])
    latents = found.store.rows(rows)
    hidden, output = fill_in(model, latents, rows, ratio, seed, "inspect/mask")
    errors = masked_errors(latents, output, hidden, model.input_patch_size)
    for one, error in zip(shown, errors.tolist(), strict=True):
        one["masked_error"] = error
    original = found.decoded(latents)
    side = original.shape[1] // latents.shape[2]  # pixels of one place of a latent
    covered = hidden[:, 0].repeat_interleave(side, 1).repeat_interleave(side, 2).numpy()
    kinds = {
        **found.source_pictures(rows),
        "latent": original,
        "masked": np.where(covered[..., None], np.uint8(_GREY), original),
        "filled in": found.decoded(torch.where(hidden, output, latents)),
        "network": found.decoded(output),
    }
    return bands(kinds, [f"{one['class']}  #{one['row']}  {one['masked_error']:.2f}" for one in shown])


def _doubts(errors: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What does not look like an MAE that has learnt from these latents, one line each."""
    warnings = []
    for name, numbers in errors.items():
        error, naive = numbers["error"], numbers["of_means"]
        if math.isnan(naive):
            warnings.append(f"{name}: some latents are not finite; drift inspect latents names them")
        elif not error < naive:
            warnings.append(
                f"masked error {error:.4g} of {numbers['rows']} latents ({name}): the channels' means alone "
                f"have {naive:.4g}; it has learnt nothing"
            )
    return warnings
