"""Encoders: whether their feature sets tell samples apart, and which samples each set has near each other."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from drift.data.latents import LatentStore
from drift.evaluation.inspect_mae import require_fit
from drift.evaluation.inspection import SIDE, Latents, Look, prepare_out, write_inspection
from drift.evaluation.pictures import image_grid
from drift.features import Encoder, load_encoders
from drift.models.mae import LatentMAE
from drift.runtime.errors import UserError
from drift.settings import Settings

_CONSTANT = 1e-5  # relative to the map; sets that are constant in exact arithmetic vary by up to 1e-6
_ROWS = 64  # latents whose features are all compared: 4032 pairs, and 0.6 GB with an MAE of width 256
_BATCH = 32  # latents that the encoder sees at once, unless hardware.feature_batch says otherwise
_MOMENT = re.compile(r"_(mean|std)(_\d+)?$")  # ending of a set's name
_NEAREST = 7
_SETS = 6  # in the picture, unless they are named
_RED = (200, 0, 0)


@dataclass(frozen=True)
class FeatureSetCheck:
    """Whether a feature set `[M, L, C]` tells samples apart."""

    name: str
    locations: int  # L
    channels: int  # C
    scale: float  # S of real samples: mean distance over the root of C, without a guard
    rms: float  # of all its numbers
    constant_channels: float  # share of channels that are the same for all samples and locations
    not_finite: float  # share of its numbers that are NaN or infinite
    by_construction: bool  # whether it is the same for all samples whatever the weights are
    problem: str | None  # why no field can use it; None if it can, or if it is so by construction


@torch.inference_mode()
def check_feature_sets(
    encoder: Encoder, latents: Tensor, *, guard: float, batch: int = _BATCH
) -> list[FeatureSetCheck]:
    """Every feature set of the drifting loss on `latents [M, C, H, W]`, at least two of different images.

    `guard` is the lower bound that the field puts on S: a smaller set is divided by the guard instead of its
    own size, so it counts too little or is rounding noise.
    """
    parts = [encoder.encode(part) for part in latents.split(batch)]
    sets = {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}
    constant_sets = _constant_by_construction(encoder, sets)
    rms = {name: float(values.square().mean().sqrt()) for name, values in sets.items()}
    checks = []
    for name, values in sets.items():
        samples, locations, channels = values.shape
        of_map = rms.get(_MOMENT.sub("", name))  # whose moments may cancel to 0
        size = rms[name] if of_map is None else of_map
        bad = 1 - float(values.isfinite().float().mean())
        constant = float((values.flatten(0, 1).std(dim=0, correction=0) <= _CONSTANT * size).float().mean())
        scale = float(_apart(values, values).sum()) / (samples * (samples - 1)) / math.sqrt(channels)
        problem, by_construction = None, name in constant_sets
        if bad:
            problem = "not finite"
        elif not by_construction:
            if constant == 1:
                problem = "constant"
            elif scale <= _CONSTANT * size:
                problem = "the same for every sample"
            elif scale < guard:
                problem = f"smaller than the field's guard ({guard:g})"
        checks.append(
            FeatureSetCheck(
                name, locations, channels, scale, rms[name], constant, bad, by_construction, problem
            )
        )
    return checks


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Distances of samples, as the mean over locations: `[M, L, C]` and `[N, L, C]` -> `[M, N]`."""
    centre = other.mean(dim=0)
    x, y = ((values - centre).transpose(0, 1).contiguous() for values in (one, other))  # [L, M, C]
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").mean(dim=0)


def _constant_by_construction(encoder: Encoder, sets: Mapping[str, Tensor]) -> set[str]:
    """Sets that are the same for all samples, up to rounding, whatever the weights are.

    The moments over a whole map that a norm with one group per channel has just made, in an MAE; and the
    standard deviation of a single location.
    """
    maps = {name: name.removesuffix("_std") for name in sets if name.endswith("_std")}
    found = {name for name, of in maps.items() if of in sets and sets[of].shape[1] == 1}
    for mae in (module for module in encoder.modules() if isinstance(module, LatentMAE)):
        for stage in range(4):
            if mae.norm_groups >= mae.config["base_channels"] * 2**stage:
                moments = re.compile(rf"layer{stage + 1}(_(mean|std)(_\d+)?)?")
                found |= {n for n, values in sets.items() if moments.fullmatch(n) and values.shape[1] == 1}
    return found


@torch.inference_mode()
def nearest_rows(
    encoder: Encoder,
    store: LatentStore,
    queries: np.ndarray,
    rows: np.ndarray,
    sets: Sequence[str],
    batch: int,
) -> dict[str, np.ndarray]:
    """By feature set, the `rows` of `store` that are nearest to each of `queries`, `[Q, K]`, nearest first.

    Rows of a query's own image, such as its mirror image, are left out.
    """
    device = next(encoder.parameters(), torch.empty(0)).device

    def encode(part: np.ndarray) -> dict[str, Tensor]:
        found = encoder.encode(store.rows(part).to(device))
        return {name: found[name] for name in sets}

    of_queries = encode(queries)
    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    apart: dict[str, list[Tensor]] = {name: [] for name in sets}
    for part in parts:
        for name, values in encode(part).items():
            apart[name].append(_apart(of_queries[name], values).cpu())
    own = (rows // store.per_image)[None] == (queries // store.per_image)[:, None]  # [Q, N]
    count = min(_NEAREST, int((~own).sum(1).min()))
    order = {
        name: torch.cat(of, dim=1).masked_fill(torch.from_numpy(own), torch.inf).argsort(dim=1, stable=True)
        for name, of in apart.items()
    }
    return {name: rows[of[:, :count].numpy()] for name, of in order.items()}


def inspect_features(
    latents: str | Path,
    settings: Settings,
    out: str | Path,
    look: Look = Look(count=4),  # noqa: B008 (frozen)
    *,
    mae: Path,
    sets: Sequence[str] = (),
    rows: int = 1024,
) -> list[str]:
    """Measure every feature set of `settings.features` on `latents`, and show neighbours; lines to print.

    Writes `neighbours.png` and `meta.json` into `out`. The picture has a block for each of `sets` (empty: a
    choice of them), in it a row for each of `look.count` latents: the latent itself, and of `rows` others
    those nearest to it. `mae` is the folder for encoders that need one. Raises what `inspect_latents` does,
    and `UserError` if the encoders cannot be loaded or are not for these latents.
    """
    found = Latents(latents, settings, look)
    store, everything = found.store, np.arange(len(found.store))
    if len(store) <= store.per_image:
        raise UserError(f"{store.folder}: features of one image cannot be compared; name more latents")
    encoder = load_encoders(settings.features, mae=mae, autoencoder=found.vae).to(look.device)
    for module in encoder.modules():
        if isinstance(module, LatentMAE):
            require_fit(mae, module, store)
    out, batch = prepare_out(out, latents, mae), settings.hardware.feature_batch or _BATCH
    guard = settings.field_settings().guards.scale
    real = store.rows(found.choose(everything, _ROWS, "inspect/features")).to(look.device)
    checks = check_feature_sets(encoder, real, guard=guard, batch=batch)
    chosen = _chosen([check.name for check in checks], sets)

    queries = found.choose(everything, look.count, "inspect/queries")
    candidates = found.choose(everything, rows, "inspect/neighbours")
    nearest = nearest_rows(encoder, store, queries, candidates, chosen, batch)
    same = {name: store.labels[near] == store.labels[queries][:, None] for name, near in nearest.items()}
    chance = float((store.labels[candidates] == store.labels[queries][:, None]).mean())
    meta = {
        "features": {"encoders": [one.model_dump() for one in settings.features], "sha256": encoder.digest},
        **found.described(queries),
        "settings": {"count": look.count, "seed": look.seed, "rows": rows},
        "feature_sets": [asdict(check) for check in checks],
        "neighbours": {
            name: {"rows": near.tolist(), "same_class": float(same[name].mean())}
            for name, near in nearest.items()
        },
        "same_class_by_chance": chance,
    }
    lines = [
        f"features:     {', '.join(one.encoder for one in settings.features)}",
        f"latents:      {store.folder}",
        *feature_table(checks),
        "",
        f"of the same class, among the nearest of {len(candidates)} latents (by chance {chance:.0%}):",
        *(f"{name:{max(map(len, chosen))}} {same[name].mean():4.0%}" for name in chosen),
    ]
    picture = _picture(found, queries, nearest, same)
    return write_inspection(out, {"neighbours.png": picture}, meta, lines, _doubts(checks))


def _chosen(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The sets to show: those `wanted`, or else some from first to last, maps rather than their moments."""
    if unknown := [name for name in wanted if name not in names]:
        raise UserError(f"--sets {unknown[0]}: there is no such feature set, but {', '.join(names)}")
    maps = [name for name in names if not _MOMENT.search(name)]
    telling = [name for name in names if name in maps or (len(maps) < _SETS and name.endswith("_mean"))]
    some = np.linspace(0, len(telling) - 1, min(_SETS, len(telling))).round().astype(int)
    return list(wanted) or [telling[index] for index in some]


def _picture(
    found: Latents, queries: np.ndarray, nearest: Mapping[str, np.ndarray], same: Mapping[str, np.ndarray]
) -> Image.Image:
    """A block per feature set, a row per query: the query, then its neighbours."""
    shown = np.unique(np.concatenate([queries, *(near.ravel() for near in nearest.values())]))
    images = found.source_pictures(shown).get("source")
    images = found.decoded(found.store.rows(shown)) if images is None else images
    names = [found.store.class_names[label] for label in found.store.labels[queries]]
    row_labels = [f"{name}  #{row}" for name, row in zip(names, queries, strict=True)]
    frame, scale = max(1, images.shape[1] // 64), -(-SIDE // images.shape[1])
    strips = []
    for name, near in nearest.items():
        rows = np.concatenate([queries[:, None], near], axis=1)  # [Q, 1 + K]
        block = images[np.searchsorted(shown, rows)]
        for query, neighbour in np.argwhere(~same[name]):
            image = block[query, 1 + neighbour]
            inside = image[frame:-frame, frame:-frame].copy()
            image[:] = _RED
            image[frame:-frame, frame:-frame] = inside
        heads = ["latent", *map(str, range(1, rows.shape[1]))]
        grid = image_grid(block.reshape(-1, *images.shape[1:]), len(heads), 2, scale, row_labels, heads)
        title = Image.new("RGB", (grid.width, 20), "white")
        ImageDraw.Draw(title).text((4, 6), f"{name}: nearest first, red of another class", "black")
        strips += [np.asarray(title), np.asarray(grid)]
    return Image.fromarray(np.concatenate(strips))


def _doubts(checks: Sequence[FeatureSetCheck]) -> list[str]:
    """The sets that no field can use, one line for each reason."""
    return [
        f"feature sets that are {problem}: {', '.join(c.name for c in checks if c.problem == problem)}"
        for problem in dict.fromkeys(check.problem for check in checks if check.problem)
    ]


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
