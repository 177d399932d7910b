"""Latents: do they look like those of the VAE, and like their images?"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from drift.data.latents import LatentStore
from drift.data.levels import from_levels
from drift.evaluation.inspection import Latents, Look, bands, prepare_out, write_inspection
from drift.settings import Settings

STD_RANGE = (0.7, 1.4)
"""Where the standard deviation of all latents together is expected.

A scaling factor is chosen to make it 1 on the VAE's own training data. On ImageNet the SD-VAE's is 0.91 (from
the means and standard deviations of its channels that EDM2 uses), on the digits 1.00 and 1.03. The smallest
scale at hand is 1.8, and leaving it out or applying it twice leaves these bounds.
"""
MEAN_LIMIT = 2.0
"""What no channel's mean should exceed, up or down; the SD-VAE's largest on ImageNet is 1.06 (EDM2)."""
CHANNEL_STD_LIMIT = 0.01
"""Below this a channel carries no information; the smallest at hand is 0.19, of the VAE of the digits."""
_NAMED = 5  # things that a warning names
_SHOWN = 16  # channels that are all shown; of more, the extreme ones
_BLOCK = 2**22  # numbers held at once, of 64 channels or fewer, while the statistics are made
_PATTERNS = {
    np.dtype(np.float16): np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64),
    np.dtype(np.uint8): from_levels(torch.arange(2**8, dtype=torch.uint8)).double().numpy(),
}
"""The latents that the bit patterns of a type stand for, in the order of the patterns."""
_VALUES = {len(values): values for values in _PATTERNS.values()}


def distribution(counts: np.ndarray) -> dict[str, float]:
    """What `counts` of each bit pattern, `[65536]` of float16 or `[256]` of levels, say of the numbers.

    Nothing is lost. Mean and standard deviation (population), minimum and maximum are those of the finite
    numbers, in float64 and NaN where there are none.
    """
    every = _VALUES[len(counts)]
    present = np.isfinite(every) & (counts > 0)
    values, weights = every[present], counts[present]
    found: dict[str, float] = dict.fromkeys(("mean", "std", "min", "max"), math.nan)
    if len(values):
        mean = values @ weights / weights.sum()
        std = math.sqrt((values - mean) ** 2 @ weights / weights.sum())
        found = {"mean": float(mean), "std": std, "min": float(values.min()), "max": float(values.max())}
    found["nans"] = int(counts[np.isnan(every)].sum())
    found["infinities"] = int(counts[np.isinf(every)].sum())
    return found


def density(counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The histogram of the finite numbers over bins with `edges` `[n + 1]`, `[n]`; its integral is the share
    of them that lies within."""
    values = _VALUES[len(counts)]
    finite = np.isfinite(values)
    histogram, _ = np.histogram(values[finite], edges, weights=counts[finite])
    return histogram / (max(1, counts[finite].sum()) * np.diff(edges))


def measure_latents(store: LatentStore, classes: int) -> tuple[dict[str, Any], np.ndarray]:
    """Statistics of all latents in one pass, however many there are.

    It takes some tens of megabytes of memory for 4 channels, and 0.7 GB for 768.

    The numbers as `meta.json` has them: `distribution` of `all` and of each of the `channels`; how many rows
    are not finite, or have one and the same number everywhere, and the first of them; rows of each class. And
    how often each bit pattern occurs in each channel, `[C, 65536]` or `[C, 256]`.
    """
    patterns = len(_PATTERNS[store.dtype])
    counts = np.zeros((store.shape[1], patterns), np.int64)
    rows: dict[str, list[int]] = {"not_finite_rows": [], "constant_rows": []}
    step = max(1, _BLOCK * max(1, len(counts) // 64) // math.prod(store.shape[1:]))
    for start in tqdm(range(0, len(store), step), desc="latents", unit="block", disable=None):
        block = store.read(np.arange(start, min(start + step, len(store)))).numpy()  # [b, C, H, W]
        bits = block.view(f"u{block.itemsize}")
        for channel, count in enumerate(counts):
            count += np.bincount(bits[:, channel].reshape(-1), minlength=patterns)
        finite = np.isfinite(block).all((1, 2, 3))
        same = (bits == bits[:, :1, :1, :1]).all((1, 2, 3)) & finite
        rows["not_finite_rows"] += (start + np.flatnonzero(~finite)).tolist()
        rows["constant_rows"] += (start + np.flatnonzero(same)).tolist()
    numbers = {
        "all": distribution(counts.sum(0)),
        "channels": [distribution(count) for count in counts],
        **{name: {"count": len(found), "first": found[:_NAMED]} for name, found in rows.items()},
        "rows_per_class": np.bincount(store.labels, minlength=classes).tolist(),
    }
    return numbers, counts


def latent_warnings(
    numbers: Mapping[str, Any], scaling_factor: float | None, classes: int, names: Sequence[str]
) -> list[str]:
    """What in the `numbers` does not look like latents of a VAE with this `scaling_factor`, one line each.

    Without a VAE it is None, and any standard deviation will do. `classes` is how many the settings have,
    `names` are those of the classes as far as they have any.
    """
    warnings, every, (low, high) = [], numbers["all"], STD_RANGE
    if numbers["not_finite_rows"]["count"]:
        rows = _listed(**numbers["not_finite_rows"])
        found = f"{every['nans']} NaN and {every['infinities']} infinite numbers"
        warnings.append(f"{found} in {rows}: encode the images again")
    std = every["std"]
    if scaling_factor is not None and not low <= std <= high and not math.isnan(std):
        known = ""
        for what, corrected in (("left out", std * scaling_factor), ("applied twice", std / scaling_factor)):
            if low <= corrected <= high:
                known = f"; they look as if the scaling factor had been {what} ({scaling_factor:g})"
        warnings.append(
            f"the standard deviation of all latents is {std:.3g}, expected {low:g} to {high:g}{known}"
        )
    warnings += _channel_warnings(numbers["channels"])
    if numbers["constant_rows"]["count"]:
        rows = _listed(**numbers["constant_rows"])
        warnings.append(f"{rows} with one and the same number everywhere: never written?")
    per_class = numbers["rows_per_class"]
    if len(per_class) > classes:
        warnings.append(f"labels up to {len(per_class) - 1}, but data.classes is {classes}")
    if missing := [label for label, rows in enumerate(per_class) if not rows]:
        named = [names[label] if label < len(names) else str(label) for label in missing[:_NAMED]]
        warnings.append(f"no latents of {_listed(len(missing), named, 'class', 'classes')}")
    return warnings


def _channel_warnings(channels: Sequence[Mapping[str, float]]) -> list[str]:
    shifted, constant, limits = [], [], f"{-MEAN_LIMIT:g} to {MEAN_LIMIT:g}"
    for index, channel in enumerate(channels):
        mean, std = channel["mean"], channel["std"]
        if abs(mean) > MEAN_LIMIT:
            shifted.append(f"the mean of channel {index} is {mean:.3g}, expected {limits}")
        if std < CHANNEL_STD_LIMIT:
            constant.append(f"channel {index} is nearly constant: its standard deviation is {std:.3g}")
    for found in (shifted, constant):
        if (more := len(found) - _NAMED) > 0:
            found[_NAMED:] = [f"and so for {more} more channels"]
    return shifted + constant


def shown_channels(channels: Sequence[Mapping[str, float]]) -> list[int]:
    """All channels, or where there are too many, those of the smallest and largest mean and deviation."""
    if len(channels) <= _SHOWN:
        return list(range(len(channels)))
    columns = np.array([[channel["mean"], channel["std"]] for channel in channels])  # [C, 2]
    return sorted({*columns.argmin(0).tolist(), *columns.argmax(0).tolist()})


def _listed(count: int, first: Sequence[Any], one: str = "row", many: str = "rows") -> str:
    """`3 rows (4, 7, 9)`: how many, and the `first` of them."""
    named = ", ".join(map(str, first)) + (", ..." if count > len(first) else "")
    return f"{count} {one if count == 1 else many} ({named})"


def _told(found: Mapping[str, float]) -> str:
    return "mean {mean:.4f}, std {std:.4f}, {min:.4g} to {max:.4g}".format_map(found)


def histogram_picture(numbers: Mapping[str, Any], counts: np.ndarray) -> Image.Image:
    """Each channel's distribution, with the unit normal for comparison, from what `measure_latents` gives."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    channels = numbers["channels"]
    shown = shown_channels(channels)
    reach = [abs(c["mean"]) + 4 * c["std"] for c in channels if not math.isnan(c["std"])]
    spread = max([4.0, *reach])
    edges = np.linspace(-spread, spread, 161)
    middles = (edges[1:] + edges[:-1]) / 2
    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    if len(shown) < len(channels):
        axes.plot(
            middles, density(counts.sum(0), edges), "k", linewidth=1.5, label=f"{len(channels)} channels"
        )
    for index in shown:
        label = "channel {}: mean {mean:.2f}, std {std:.2f}".format(index, **channels[index])
        axes.plot(middles, density(counts[index], edges), linewidth=1.5, label=label)
    normal = np.exp(-(middles**2) / 2) / math.sqrt(2 * math.pi)
    axes.plot(middles, normal, color="0.4", linestyle="--", linewidth=1.2, label="unit normal")
    # By the root, so that a channel with a narrow peak leaves the others visible
    axes.set_yscale("function", functions=(np.sqrt, np.square))
    axes.set(xlim=(-spread, spread), xlabel="latent value", ylabel="density (square-root axis)")
    axes.set(ylim=(0, None), title=f"all: {_told(numbers['all'])}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=1 + len(shown) // 9)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def inspect_latents(
    folder: str | Path,
    settings: Settings,
    out: str | Path,
    look: Look = Look(),  # noqa: B008 (frozen)
    view: str | None = None,
) -> list[str]:
    """Decode random latents of `folder` and measure all of them; returns the lines to print.

    Writes `latents.png`, `histogram.png` and `meta.json` into `out`. With `look.images`, each decoded latent
    has the centre view of its image below it; where that is what was encoded, the two are compared. `view` is
    what the latents must be of, None for any. Raises `UserError` if a file is missing, damaged, changed since
    it was written or not of these settings, if the images are not those that were encoded, or if `out` cannot
    be written.
    """
    latents = Latents(folder, settings, look, view)
    out, store, classes = prepare_out(out, folder), latents.store, settings.data.classes
    numbers, counts = measure_latents(store, max(classes, store.num_classes))
    scale = latents.vae.scaling_factor if latents.vae.needs_source else None
    warnings = latent_warnings(numbers, scale, classes, store.class_names)
    per_class = numbers["rows_per_class"]
    lines = [
        f"latents:     {store.folder}, {len(store)} of {'x'.join(map(str, store.shape[1:]))}, "
        f"view {store.meta.get('view', 'unknown')}",
        f"all:         {_told(numbers['all'])}",
        *(
            f"channel {index}:   {_told(numbers['channels'][index])}"
            for index in shown_channels(numbers["channels"])
        ),
        f"classes:     {len(per_class)} with {min(per_class)} to {max(per_class)} rows, "
        f"median {np.median(per_class):g}",
    ]
    rows = latents.choose(np.arange(len(store)), look.count, "inspect/latents")
    kinds = {"decoded": latents.decoded(store.rows(rows)), **latents.source_pictures(rows)}
    differences = {}
    if latents.sources is not None and latents.sources.exact and len(rows) > 1:
        own = _rms(kinds["decoded"], kinds["source"])
        other = _rms(kinds["decoded"], np.roll(kinds["source"], len(rows) // 2, axis=0))
        differences = {"own": own, "unrelated": other}
        levels = f"{own:.1f} levels of 255 (RMS), and by {other:.1f} from other images"
        lines.append(f"difference:  from their images by {levels}")
        if own > other / 2:
            warnings.append(
                f"the decoded latents differ from their images by {levels}: they are not of these images, "
                "or not of this VAE"
            )
    meta = {
        **latents.described(rows),
        "settings": {"count": look.count, "seed": look.seed, "classes": classes},
        "statistics": numbers,
        "difference_from_source": differences,
    }
    captions = [f"{each['class']}  #{each['row']}" for each in meta["shown"]]
    pictures = {"latents.png": bands(kinds, captions), "histogram.png": histogram_picture(numbers, counts)}
    return write_inspection(out, pictures, meta, lines, warnings)


def _rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))
