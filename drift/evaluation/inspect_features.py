"""The MAE: what it makes of masked latents, and whether its feature sets tell samples apart."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch import Tensor

from drift.data.bank import held_out_rows
from drift.data.latents import LatentReader, LatentStore
from drift.evaluation.inspect_reading import WAY_OUT, SourceImages, choose, open_latents, open_vae, view_of
from drift.evaluation.inspect_writing import (
    Inspection,
    bands,
    caption,
    decoded,
    describe_latents,
    describe_row,
    finite_or_none,
    png_bytes,
    prepare_out,
    write_inspection,
)
from drift.evaluation.sample import ImageDecoder
from drift.field.distances import distances
from drift.models.base import model_files
from drift.models.mae import LatentMAE, draw_mask
from drift.runtime.errors import UserError
from drift.runtime.files import sha256
from drift.runtime.processes import Ranks
from drift.runtime.progress import read_log
from drift.runtime.seeds import torch_generator
from drift.settings import Settings
from drift.training.mae import masked_error

_CONSTANT = 1e-5  # relative to the map; sets that are constant in exact arithmetic vary by up to 1e-6
_FEATURE_ROWS = 64  # latents whose features are compared: 4032 pairs, and 0.6 GB with an encoder of width 256
_BATCH = 32  # latents that the MAE sees at once
_LOG_TOLERANCE = 0.02  # relative: the log may be of bfloat16, or of another machine
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

    `guard` is the lower bound that the field puts on S (`drift.field.settings.GUARDS`): a set below it is
    divided by the guard in place of its own size, so it counts too little or is rounding noise.
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
        std = values.flatten(0, 1).std(dim=0, correction=0)
        constant = float((std <= _CONSTANT * size).float().mean())
        vectors = (values - values.mean(dim=0)).transpose(0, 1).contiguous()  # [L, M, C]
        apart = distances(vectors, vectors, "l2", 0.0, self_pairs=True)
        mean = apart.sum() / (len(apart) * len(latents) * (len(latents) - 1))
        scale = float(mean) / math.sqrt(values.shape[2])
        problem = None
        if bad:
            problem = "not finite"
        elif name not in constant_sets:
            if constant == 1:
                problem = "constant"
            elif scale <= _CONSTANT * size:
                problem = "the same for every sample"
            elif scale < guard:
                problem = f"smaller than the field's guard ({guard:g})"
        checks.append(
            FeatureSetCheck(
                name=name,
                locations=values.shape[1],
                channels=values.shape[2],
                scale=scale,
                rms=rms[name],
                constant_channels=constant,
                not_finite=bad,
                by_construction=name in constant_sets,
                problem=problem,
            )
        )
    return checks


def _constant_by_construction(model: LatentMAE, sets: Mapping[str, Tensor]) -> set[str]:
    """Sets that are the same for all samples, up to rounding, whatever the weights of the MAE are.

    The moments over a whole map that a norm with one group per channel has just made; and the standard
    deviation of a single location.
    """
    found = {
        name
        for name, values in sets.items()
        if re.fullmatch(r".*_std", name) and sets[name.removesuffix("_std")].shape[1] == 1
    }
    for stage in range(4):
        if model.norm_groups >= model.config.base_channels * 2**stage:
            moments = re.compile(rf"layer{stage + 1}(_(mean|std)(_\d+)?)?")
            found |= {n for n, values in sets.items() if moments.fullmatch(n) and values.shape[1] == 1}
    return found


def error_of_means(model: LatentMAE, store: LatentStore, rows: np.ndarray, ratio: float, seed: int) -> float:
    """What `drift.training.mae.masked_error` of `rows` `[n]` would be, were the channels' means all it knew.

    The means are those over `rows`, the masks the same as there.
    """
    latents = store.rows(rows)  # [n, C, H, W]
    means = latents.mean(dim=(0, 2, 3))[:, None, None]
    hidden = _hidden(_masks(model, store, rows, ratio, seed, "mae/held_out"), model.patch_size)
    errors = (latents - means).square() * hidden
    return float((errors.sum(dim=(1, 2, 3)) / hidden.sum(dim=(1, 2, 3)).clamp(min=1)).mean())


def inspect_mae(
    folder: str | Path,
    latents: str | Path,
    settings: Settings,
    out: str | Path,
    *,
    count: int = 8,
    seed: int = 0,
    rows: int = 1024,
    compare: bool = False,
    root: str | None = None,
    feature_sets: bool = False,
    device: str | torch.device = "cpu",
) -> Inspection:
    """Show what the MAE of `folder` makes of masked `latents`, and measure it.

    Writes `mae.png` and `meta.json` into `out`: from above, the source image (with `compare`; see
    `inspect_latents`), the decoded latent, what is masked of it (grey), the masked places as the network
    fills them, and the network's output alone. Images that were held out of training are shown if there are
    any. The masked error is that of at most `rows` latents of held-out images and of as many others.
    With `feature_sets`, every feature set of the drifting loss is checked by `check_feature_sets`.

    Raises `UserError` as `inspect_latents` does, and if the MAE is not one for these latents.
    """
    folder = Path(folder)
    model = LatentMAE.from_pretrained(folder).to(device)
    store = open_latents(latents, settings, None)
    _require_fit(folder, model, store)
    differing, trained_on_these, logged = _training_of(folder, settings, store)
    options = settings.mae
    # What an encoder from elsewhere has seen is unknown
    held_out_images = options.held_out if options.source is None else 0
    held_out = held_out_rows(len(store), store.per_image, held_out_images, settings.seed)
    if feature_sets and len(store) < 2:
        raise UserError(f"{store.folder}: features of one latent cannot be compared; name more latents")
    sources = SourceImages(store, settings, root) if compare else None
    vae = open_vae(store, settings, device)
    out = prepare_out(out, latents, folder)
    warnings = []
    if differing:
        warnings.append(
            f"{folder} was trained with other masks or held-out images than these settings have "
            f"({', '.join(differing)}): what is called held out is not, and the error is not that of its log"
        )
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        warnings.append(f"{folder}: some of its weights are not finite: train it again")

    others = np.setdiff1d(np.arange(len(store)), held_out, assume_unique=True)
    reader, weights = LatentReader(store, torch.device(device), on_device=False), model.state_dict()
    common = {
        "seed": settings.seed,
        "hardware": settings.hardware,
        "ranks": Ranks(0, 1, torch.device(device)),
    }
    errors: dict[str, dict[str, Any]] = {}
    for name, all_rows in (("held_out", held_out), ("others", others)):
        if len(all_rows):
            chosen = np.sort(choose(all_rows, rows, seed, "inspect/rows"))
            error = float(masked_error(model, weights, reader, chosen, options, **common))
            naive = error_of_means(model, store, chosen, options.mask_ratio, settings.seed)
            errors[name] = {"error": error, "of_means": naive, "rows": len(chosen)}
            if math.isnan(naive):
                warnings.append(
                    f"{store.folder}: has latents that are not finite; drift inspect latents tells which"
                )
            elif not error < naive:
                warnings.append(
                    f"masked error {error:.4g} of {len(chosen)} latents ({name.replace('_', ' ')}): the "
                    f"channels' means in place of the network have {naive:.4g}; it has learnt nothing"
                )
    logged_of_same = trained_on_these and not differing and 0 < len(held_out) <= rows
    logged = logged if logged_of_same else None
    if logged is not None:
        error = errors["held_out"]["error"]
        if not abs(error - logged) <= _LOG_TOLERANCE * logged:
            warnings.append(
                f"masked error {error:.4g} of held-out images, but {folder}/logs.jsonl ends with "
                f"{logged:.4g}: weights and log are not of one run"
            )

    shown = choose(held_out if len(held_out) else others, count, seed, "inspect/mae")
    shown = shown[np.argsort(store.labels[shown], kind="stable")]
    decode = ImageDecoder(vae, min(len(shown), settings.hardware.decode_batch))
    kinds, shown_errors = _mae_pictures(model, store, shown, options.mask_ratio, seed, decode, device)
    if sources is not None:
        kinds = {"source": np.stack([sources.picture(int(row)) for row in shown]), **kinds}
    captions = [
        f"{caption(store, int(row))}  {error:.2f}" for row, error in zip(shown, shown_errors, strict=True)
    ]
    grid = bands(kinds, captions)

    checks: list[FeatureSetCheck] | None = None
    if feature_sets:
        real = store.rows(choose(np.arange(len(store)), _FEATURE_ROWS, seed, "inspect/features"))
        checks = check_feature_sets(
            model,
            real.to(device),
            drop_duplicates=settings.drift.duplicate_features == "drop",
            guard=settings.field().guards.scale,
        )
        warnings += _warnings_of(checks)

    meta = {
        "mae": {
            "folder": str(folder),
            "sha256": {file.name: sha256(file) for file in model_files(folder)},
        },
        "latents": describe_latents(store),
        "vae": {"id": vae.id, "revision": vae.revision, "sha256": vae.digest},
        "images": None if sources is None else sources.described(),
        "settings": {
            "count": count,
            "seed": seed,
            "rows": rows,
            "mask_ratio": options.mask_ratio,
            "held_out": options.held_out,
            "training_seed": settings.seed,
        },
        "masked_error": {
            name: {key: finite_or_none(value) for key, value in values.items()}
            for name, values in errors.items()
        },
        "logged_held_out": logged,
        "shown": [
            {**describe_row(store, sources, int(row)), "masked_error": finite_or_none(error)}
            for row, error in zip(shown, shown_errors, strict=True)
        ],
        "feature_sets": checks
        and [
            {k: finite_or_none(v) if isinstance(v, float) else v for k, v in asdict(c).items()}
            for c in checks
        ],
        "warnings": warnings,
    }
    files = write_inspection(out, {"mae.png": png_bytes(grid)}, meta)
    lines = [
        f"mae:          {folder}, width {model.config.base_channels}",
        f"latents:      {store.folder}, view {view_of(store) or 'unknown'}",
        *_lines_of_errors(errors, logged),
    ]
    if checks is not None:
        lines += ["", *feature_table(checks)]
    return Inspection(lines, warnings, files)


def feature_table(checks: Sequence[FeatureSetCheck]) -> list[str]:
    """The checks as the lines of a table, and a line about sets that are constant by construction."""
    rows = [["feature set", "L", "C", "scale S", "rms", "constant", "not finite", ""]]
    for check in checks:
        mark = check.problem or ("constant by construction" if check.by_construction else "")
        rows.append(
            [
                check.name,
                str(check.locations),
                str(check.channels),
                f"{check.scale:.3g}",
                f"{check.rms:.3g}",
                f"{check.constant_channels:.0%}",
                f"{check.not_finite:.0%}",
                f"<- {mark}" if mark else "",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(width) if column in (0, len(widths) - 1) else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if by_construction := [check.name for check in checks if check.by_construction]:
        lines.append(
            f"constant by construction: {', '.join(by_construction)} (moments of a whole map whose norm has "
            "one channel per group, or of a single location); lower mae.norm_groups if that is to change"
        )
    return lines


def _mae_pictures(
    model: LatentMAE,
    store: LatentStore,
    rows: np.ndarray,
    ratio: float,
    seed: int,
    decode: ImageDecoder,
    device: str | torch.device,
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The kinds of `bands`, and the masked error of each row."""
    latents = store.rows(rows)  # [n, C, H, W]
    mask = _masks(model, store, rows, ratio, seed, "inspect/mask")
    hidden = _hidden(mask, model.patch_size)
    outputs, errors = [], []
    with torch.inference_mode():
        for x, m, h in zip(latents.split(_BATCH), mask.split(_BATCH), hidden.split(_BATCH), strict=True):
            outputs.append(model.reconstruct(x.masked_fill(h, 0).to(device))[0].float().cpu())
            errors += model(x.to(device), m.to(device))[0].tolist()
    output = torch.cat(outputs)
    original = decoded(decode, latents)
    side = original.shape[1] // latents.shape[2]  # pixels of one place of a latent
    covered = hidden[:, 0].repeat_interleave(side, 1).repeat_interleave(side, 2).numpy()  # [n, S, S]
    masked = original.copy()
    masked[covered] = _GREY
    kinds = {
        "latent": original,
        "masked": masked,
        "filled in": decoded(decode, torch.where(hidden, output, latents)),
        "network": decoded(decode, output),
    }
    return kinds, errors


def _masks(
    model: LatentMAE, store: LatentStore, rows: np.ndarray, ratio: float, seed: int, what: str
) -> Tensor:
    """The masks of `rows`, bool `[n, h, w]`, each a function of (seed, what, row)."""
    grid = model.mask_grid(*store.shape[2:])
    return torch.cat([draw_mask((1, *grid), ratio, torch_generator(seed, what, int(row))) for row in rows])


def _hidden(mask: Tensor, patch: int) -> Tensor:
    """Masked squares `[n, h, w]` -> masked places, bool `[n, 1, H, W]`."""
    return mask.repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)[:, None]


def _require_fit(folder: Path, model: LatentMAE, store: LatentStore) -> None:
    config = model.config
    if model.input_patch_size != 1:
        raise UserError(
            f"{folder}: an MAE of pixels (input_patch_size {model.input_patch_size}); name one of latents"
        )
    if config.in_channels != store.shape[1]:
        raise UserError(
            f"{folder}: an MAE of {config.in_channels} channels, but {store.folder} has latents of "
            f"{store.shape[1]}; name latents and MAE that belong together"
        )
    model.mask_grid(*store.shape[2:])


def _training_of(
    folder: Path, settings: Settings, store: LatentStore
) -> tuple[list[str], bool, float | None]:
    """How the MAE was trained: what differs in masks or held-out images, whether on `store`, its last log.

    The last is the logged error of held-out images. As far as the files beside the MAE tell: it may come from
    elsewhere, without any.
    """
    path = folder / "settings.yaml"
    if not path.exists():
        return [], False, None
    try:
        decides = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))["decides"]
        if "mask_ratio" not in decides["mae"]:  # taken from `mae.source`, whose training is unknown
            return [], False, None
        found = {"seed": decides["seed"], **{f"mae.{key}": decides["mae"][key] for key in _MASKING}}
        latents = decides["latents"]
    except (OSError, ValueError, KeyError, TypeError, YAMLError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"{path}: not what the stage mae writes ({reason}); {WAY_OUT}") from None
    now = {"seed": settings.seed, **{f"mae.{key}": getattr(settings.mae, key) for key in _MASKING}}
    lines = [line for line in read_log(folder / "logs.jsonl") if isinstance(line, dict)]
    logged = [line["held_out"] for line in lines if isinstance(line.get("held_out"), float)]
    differing = [f"{key} was {found[key]}" for key in now if found[key] != now[key]]
    return differing, latents == store.digest, logged[-1] if logged else None


def _lines_of_errors(errors: Mapping[str, Mapping[str, Any]], logged: float | None) -> list[str]:
    others = "other latents" if "held_out" in errors else "latents"
    names = {"held_out": "latents of images held out of training", "others": others}
    lines, title = [], "masked error: "
    for name, values in errors.items():
        line = f"{title}{values['error']:.4f} of {values['rows']} {names[name]}"
        if name == "held_out" and logged is not None:
            line += f" (at the end of training: {logged:.4f})"
        lines.append(f"{line}; the channels' means: {values['of_means']:.4f}")
        title = " " * len(title)
    return lines


def _warnings_of(checks: Sequence[FeatureSetCheck]) -> list[str]:
    """One line per problem, which names the sets that have it."""
    found: dict[str, list[str]] = {}
    for check in checks:
        if check.problem is not None:
            found.setdefault(check.problem, []).append(check.name)
    return [f"feature sets that are {p}: {', '.join(names)}" for p, names in found.items()]
