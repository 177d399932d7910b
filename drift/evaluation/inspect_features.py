"""The MAE: what it makes of masked latents, and whether its feature sets tell samples apart."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drift.data.bank import held_out_rows
from drift.data.latents import LatentStore
from drift.evaluation.inspection import WAY_OUT, Inspection, Latents, Look, bands, prepare_out
from drift.models.base import model_files
from drift.models.mae import LatentMAE, draw_mask
from drift.runtime.errors import UserError
from drift.runtime.files import sha256
from drift.runtime.seeds import torch_generator
from drift.runtime.work import settings_in_force
from drift.runtime.yaml_files import read_yaml
from drift.settings import Mae, Settings

_CONSTANT = 1e-5  # relative to the map; sets that are constant in exact arithmetic vary by up to 1e-6
_FEATURE_ROWS = 64  # latents whose features are compared: 4032 pairs, and 0.6 GB with an encoder of width 256
_BATCH = 32  # latents that the MAE sees at once
_MASKING = ("held_out", "mask_ratio")  # of the settings of the MAE, beside the seed
_GREY = 128  # what is masked


@dataclass(frozen=True)
class FeatureSetCheck:
    """Whether a feature set tells samples apart."""

    name: str
    locations: int
    """L."""
    channels: int
    """C."""
    scale: float
    """S of real samples among each other: mean distance over the root of the channels, without a guard."""
    rms: float
    """Of all its numbers."""
    constant_channels: float
    """Share of channels that are the same for all samples and locations."""
    not_finite: float
    """Share of its numbers that are NaN or infinite."""
    by_construction: bool
    """Whether it is the same for all samples whatever the weights are."""
    problem: str | None
    """Why no field can use it; None if it can, or if it is so by construction."""


@torch.inference_mode()
def check_feature_sets(
    model: LatentMAE, latents: Tensor, *, drop_duplicates: bool, guard: float
) -> list[FeatureSetCheck]:
    """Every feature set of the drifting loss on `latents [M, C, H, W]`, at least two of different images.

    `guard` is the lower bound that the field puts on S: a smaller set is divided by the guard instead of its
    own size, so it counts too little or is rounding noise.
    """
    parts = [model.encode(part, drop_duplicates=drop_duplicates) for part in latents.split(_BATCH)]
    sets = {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}
    sets["global"] = latents.float().flatten(1)[:, None]
    constant_sets = _constant_by_construction(model, sets)
    rms = {name: float(values.square().mean().sqrt()) for name, values in sets.items()}
    checks = []
    for name, values in sets.items():
        size = rms[re.sub(r"_(mean|std)(_\d+)?$", "", name)]  # of the map, whose moments may cancel to 0
        bad = 1 - float(values.isfinite().float().mean())
        constant = float((values.flatten(0, 1).std(dim=0, correction=0) <= _CONSTANT * size).float().mean())
        vectors = (values - values.mean(dim=0)).transpose(0, 1).contiguous()  # [L, M, C]
        apart = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
        pairs = len(apart) * len(latents) * (len(latents) - 1)
        scale = float(apart.sum()) / pairs / math.sqrt(values.shape[2])
        problems = {
            "not finite": bad > 0,
            "constant": constant == 1,
            "the same for every sample": scale <= _CONSTANT * size,
            f"smaller than the field's guard ({guard:g})": scale < guard,
        }
        if name in constant_sets and not bad:
            problems = {}
        problem = next((what for what, found in problems.items() if found), None)
        shape = values.shape[1:]
        checks.append(
            FeatureSetCheck(name, *shape, scale, rms[name], constant, bad, name in constant_sets, problem)
        )
    return checks


def _constant_by_construction(model: LatentMAE, sets: Mapping[str, Tensor]) -> set[str]:
    """Sets that are the same for all samples, up to rounding, whatever the weights of the MAE are.

    The moments over a whole map that a norm with one group per channel has just made; and the standard
    deviation of a single location.
    """
    found = {n for n in sets if n.endswith("_std") and sets[n.removesuffix("_std")].shape[1] == 1}
    for stage in range(4):
        if model.norm_groups >= model.config.base_channels * 2**stage:
            moments = re.compile(rf"layer{stage + 1}(_(mean|std)(_\d+)?)?")
            found |= {n for n, values in sets.items() if moments.fullmatch(n) and values.shape[1] == 1}
    return found


@dataclass(frozen=True)
class Masked:
    """Latents of some rows, what is hidden of them, and what the MAE makes of the rest."""

    latents: Tensor  # [n, C, H, W]
    hidden: Tensor  # bool [n, 1, H, W]
    output: Tensor  # [n, C, H, W]
    errors: Tensor
    """`[n]`, as the stage mae computes and logs them."""

    @classmethod
    @torch.inference_mode()
    def of(
        cls, model: LatentMAE, store: LatentStore, rows: np.ndarray, ratio: float, seed: int, what: str
    ) -> "Masked":
        """The mask of a row is a function of (seed, what, row)."""
        latents, grid = store.rows(rows), model.mask_grid(*store.shape[2:])
        masks = [draw_mask((1, *grid), ratio, torch_generator(seed, what, int(row))) for row in rows]
        mask, size = torch.cat(masks), model.patch_size
        hidden = mask.repeat_interleave(size, dim=1).repeat_interleave(size, dim=2)[:, None]
        outputs, errors, device = [], [], next(model.parameters()).device
        for x, m, h in zip(latents.split(_BATCH), mask.split(_BATCH), hidden.split(_BATCH), strict=True):
            outputs.append(model.reconstruct(x.masked_fill(h, 0).to(device))[0].float().cpu())
            errors.append(model(x.to(device), m.to(device))[0].float().cpu())
        return cls(latents, hidden, torch.cat(outputs), torch.cat(errors))

    def error_of_means(self) -> float:
        """What the mean error would be if the MAE knew nothing but the mean of each channel."""
        means = self.latents.mean(dim=(0, 2, 3))[:, None, None]
        errors = ((self.latents - means).square() * self.hidden).sum(dim=(1, 2, 3))
        return float((errors / self.hidden.sum(dim=(1, 2, 3)).clamp(min=1)).mean())

    def pictures(self, decoded: Callable[[Tensor], np.ndarray]) -> dict[str, np.ndarray]:
        """Decoded latent, the same with what is masked in grey, with that filled in, and the output alone."""
        original = decoded(self.latents)
        side = original.shape[1] // self.latents.shape[2]  # pixels of one place of a latent
        covered = self.hidden[:, 0].repeat_interleave(side, 1).repeat_interleave(side, 2).numpy()
        return {
            "latent": original,
            "masked": np.where(covered[..., None], np.uint8(_GREY), original),
            "filled in": decoded(torch.where(self.hidden, self.output, self.latents)),
            "network": decoded(self.output),
        }


def _differing(folder: Path, settings: Settings) -> list[str]:
    """How masks and held-out images of the MAE's training differ from the settings, as far as is known."""
    path = folder / "settings.yaml"
    if not path.exists():  # from elsewhere
        return []
    try:
        decides = settings_in_force(read_yaml(path, WAY_OUT))
        if decides["mae"].get("source"):  # whose training is unknown
            return []
        # Older files say only what differs from the defaults
        of_mae = {key: decides["mae"].get(key, getattr(Mae(), key)) for key in _MASKING}
        then = {"seed": decides["seed"], **{f"mae.{key}": value for key, value in of_mae.items()}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"{path}: not what the stage mae writes ({reason}); {WAY_OUT}") from None
    now = {"seed": settings.seed, **{f"mae.{key}": getattr(settings.mae, key) for key in _MASKING}}
    return [f"{key} was {then[key]}" for key in now if then[key] != now[key]]


def inspect_mae(
    folder: str | Path,
    latents: str | Path,
    settings: Settings,
    out: str | Path,
    look: Look = Look(count=8),  # noqa: B008 (frozen)
    *,
    rows: int = 1024,
    feature_sets: bool = False,
) -> Inspection:
    """Show what the MAE of `folder` makes of masked `latents`, and measure it.

    Writes `mae.png` and `meta.json` into `out`: from above, the source image (with `look.compare`), and the
    pictures of `Masked`; of held-out images if there are any. The masked error is that of at most `rows`
    latents of held-out images and of as many others. `feature_sets` asks for `check_feature_sets`. Raises
    what `inspect_latents` does, and `UserError` if the MAE is not one for these latents.
    """
    folder, options = Path(folder), settings.mae
    differing, model = _differing(folder, settings), LatentMAE.from_pretrained(folder).to(look.device)
    found = Latents(latents, settings, look)
    store, every_row = found.store, np.arange(len(found.store))
    _require_fit(folder, model, store)
    if feature_sets and len(store) < 2:
        raise UserError(f"{store.folder}: features of one latent cannot be compared; name more latents")
    # What an encoder from elsewhere has seen is unknown
    count = options.held_out if options.source is None else 0
    held_out = held_out_rows(len(store), store.per_image, count, settings.seed)
    others = np.setdiff1d(every_row, held_out, assume_unique=True)
    out = prepare_out(out, latents, folder)

    errors = {
        name: _masked_error(model, store, found.choose(every, rows, "inspect/rows"), settings)
        for name, every in (("held out", held_out), ("others", others))
        if len(every)
    }
    checks = []
    if feature_sets:
        real = store.rows(found.choose(every_row, _FEATURE_ROWS, "inspect/features"))
        drop, guard = settings.drops_duplicates, settings.field_settings().guards.scale
        checks = check_feature_sets(model, real.to(look.device), drop_duplicates=drop, guard=guard)

    shown = found.choose(held_out if len(held_out) else others, look.count, "inspect/mae")
    masked = Masked.of(model, store, shown, options.mask_ratio, look.seed, "inspect/mask")
    kinds = {**found.source_pictures(shown), **masked.pictures(found.decoded)}
    each = found.described_rows(shown)
    for one, error in zip(each, masked.errors.tolist(), strict=True):
        one["masked_error"] = error
    grid = bands(kinds, [f"{one['class']}  #{one['row']}  {one['masked_error']:.2f}" for one in each])
    meta = {
        "mae": {"folder": str(folder), "sha256": {path.name: sha256(path) for path in model_files(folder)}},
        **found.described(),
        "settings": {"count": look.count, "seed": look.seed, "rows": rows, "mask_ratio": options.mask_ratio},
        "masked_error": errors,
        "shown": each,
        "feature_sets": [asdict(check) for check in checks],
    }
    lines = [f"mae:          {folder}, width {model.config.base_channels}", f"latents:      {store.folder}"]
    lines += [*_lines(errors), *feature_table(checks)]
    warnings = _warnings(folder, model, differing, errors, checks)
    return Inspection(lines, warnings).write(out, {"mae.png": grid}, meta)


def _require_fit(folder: Path, model: LatentMAE, store: LatentStore) -> None:
    config = model.config
    if config.input_patch_size != 1:
        raise UserError(
            f"{folder}: an MAE of pixels (input_patch_size {config.input_patch_size}); name one of latents"
        )
    if config.in_channels != store.shape[1]:
        raise UserError(
            f"{folder}: an MAE of {config.in_channels} channels, but {store.folder} has latents of "
            f"{store.shape[1]}; name latents and MAE that belong together"
        )
    model.mask_grid(*store.shape[2:])


def _masked_error(
    model: LatentMAE, store: LatentStore, rows: np.ndarray, settings: Settings
) -> dict[str, float]:
    masked = Masked.of(model, store, rows, settings.mae.mask_ratio, settings.seed, "mae/held_out")
    return {"error": float(masked.errors.mean()), "of_means": masked.error_of_means(), "rows": len(rows)}


def _lines(errors: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [
        f"masked error: {numbers['error']:.4f} of {numbers['rows']} latents ({name}); "
        f"the channels' means: {numbers['of_means']:.4f}"
        for name, numbers in errors.items()
    ]


def _warnings(
    folder: Path,
    model: LatentMAE,
    differing: Sequence[str],
    errors: Mapping[str, Mapping[str, float]],
    checks: Sequence[FeatureSetCheck],
) -> list[str]:
    """What does not look like an MAE that has learnt from these latents, one line each."""
    warnings = []
    if differing:
        warnings.append(
            f"{folder} was trained with other masks or held-out images than these settings have "
            f"({', '.join(differing)}): those called held out here were not, and its log differs"
        )
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        warnings.append(f"{folder}: some of its weights are not finite: train it again")
    for name, numbers in errors.items():
        error, naive = numbers["error"], numbers["of_means"]
        if math.isnan(naive):
            warnings.append(f"{name}: some latents are not finite; drift inspect latents names them")
        elif not error < naive:
            warnings.append(
                f"masked error {error:.4g} of {numbers['rows']} latents ({name}): the channels' means alone "
                f"have {naive:.4g}; it has learnt nothing"
            )
    for problem in dict.fromkeys(check.problem for check in checks if check.problem):
        names = ", ".join(check.name for check in checks if check.problem == problem)
        warnings.append(f"feature sets that are {problem}: {names}")
    return warnings


def feature_table(checks: Sequence[FeatureSetCheck]) -> list[str]:
    """The checks as the lines of a table, and a line about sets that are constant by construction."""
    if not checks:
        return []
    width = max(len(check.name) for check in checks)
    lines = ["", f"{'feature set':{width}}     L      C    scale S        rms  constant  not finite"]
    for check in checks:
        mark = check.problem or ("constant by construction" if check.by_construction else "")
        line = f"{check.name:{width}} {check.locations:5} {check.channels:6} {check.scale:10.3g} "
        line += f"{check.rms:10.3g} {check.constant_channels:9.0%} {check.not_finite:11.0%}"
        lines.append(f"{line}  <- {mark}" if mark else line)
    if names := [check.name for check in checks if check.by_construction]:
        lines.append(
            f"constant by construction: {', '.join(names)} (moments of a whole map whose norm has one "
            "channel per group, or of a single location); a lower mae.norm_groups changes that"
        )
    return lines
