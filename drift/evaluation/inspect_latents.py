"""Latents: do they look like those of the VAE, and like their images?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from drift.data.latents import LatentStore
from drift.evaluation.inspection import Inspection, Latents, Look, bands, prepare_out
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
_BLOCK = 2**22  # numbers held at once while the statistics are made


class Distribution:
    """How often each value occurs among float16 numbers: one count per bit pattern, so nothing is lost.

    Mean and standard deviation (population), minimum and maximum are those of the finite numbers, in float64
    and NaN where there are none.
    """

    _VALUES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)

    def __init__(self, counts: np.ndarray):
        """`counts` `[65536]` int64 by bit pattern."""
        self.nans = int(counts[np.isnan(self._VALUES)].sum())
        self.infinities = int(counts[np.isinf(self._VALUES)].sum())
        present = np.isfinite(self._VALUES) & (counts > 0)
        values, self._counts = self._VALUES[present], counts[present]
        self._values, total = values, self._counts.sum()
        self.mean = self.std = self.min = self.max = math.nan
        if len(values):
            self.mean, self.min, self.max = values @ self._counts / total, values.min(), values.max()
            self.std = math.sqrt((values - self.mean) ** 2 @ self._counts / total)

    def density(self, edges: np.ndarray) -> np.ndarray:
        """The histogram over bins with `edges` `[n + 1]`, `[n]`: its integral is the share within them."""
        histogram, _ = np.histogram(self._values, edges, weights=self._counts)
        return histogram / (max(1, self._counts.sum()) * np.diff(edges))

    def numbers(self) -> dict[str, float]:
        names = ("mean", "std", "min", "max", "nans", "infinities")
        return {name: float(getattr(self, name)) for name in names}

    def __str__(self) -> str:
        return f"mean {self.mean:.4f}, std {self.std:.4f}, {self.min:.4g} to {self.max:.4g}"


@dataclass(frozen=True)
class LatentStatistics:
    """Numbers about all latents of a store."""

    counts: np.ndarray
    """`[C, 65536]`, of each bit pattern in each channel."""
    not_finite_rows: list[int]
    constant_rows: list[int]
    """Rows whose numbers are all the same."""
    per_class: np.ndarray
    """Rows of each class, `[classes]`."""

    @cached_property
    def channels(self) -> list[Distribution]:
        return [Distribution(counts) for counts in self.counts]

    @cached_property
    def all(self) -> Distribution:
        """All channels together."""
        return Distribution(self.counts.sum(0))

    def as_json(self) -> dict[str, Any]:
        rows = {"not_finite_rows": self.not_finite_rows, "constant_rows": self.constant_rows}
        return {
            "all": self.all.numbers(),
            "channels": [channel.numbers() for channel in self.channels],
            **{name: {"count": len(found), "first": found[:_NAMED]} for name, found in rows.items()},
            "rows_per_class": self.per_class.tolist(),
        }


def measure_latents(store: LatentStore, classes: int, *, progress: bool = False) -> LatentStatistics:
    """Statistics of all latents in one pass, with some tens of megabytes of memory however many there are."""
    counts = np.zeros((store.shape[1], 2**16), np.int64)
    not_finite: list[int] = []
    constant: list[int] = []
    step = max(1, _BLOCK // math.prod(store.shape[1:]))
    for start in tqdm(range(0, len(store), step), desc="latents", unit="block", disable=not progress):
        block = store.read(np.arange(start, min(start + step, len(store)))).numpy()  # [b, C, H, W]
        bits = block.view(np.uint16)
        for channel, count in enumerate(counts):
            count += np.bincount(bits[:, channel].reshape(-1), minlength=2**16)
        finite = np.isfinite(block).all((1, 2, 3))
        same = (bits == bits[:, :1, :1, :1]).all((1, 2, 3)) & finite
        not_finite += (start + np.flatnonzero(~finite)).tolist()
        constant += (start + np.flatnonzero(same)).tolist()
    return LatentStatistics(counts, not_finite, constant, np.bincount(store.labels, minlength=classes))


def latent_warnings(
    statistics: LatentStatistics, scaling_factor: float, classes: int, names: Sequence[str]
) -> list[str]:
    """What does not look like latents of a VAE with this `scaling_factor`, one line each.

    `classes` is how many the settings have, `names` are those of the classes as far as they have any.
    """
    warnings, found, (low, high) = [], statistics.all, STD_RANGE
    if rows := statistics.not_finite_rows:
        numbers = f"{found.nans} NaN and {found.infinities} infinite numbers"
        warnings.append(f"{numbers} in {_listed(rows, 'row')}: encode the images again")
    if not low <= found.std <= high and not math.isnan(found.std):
        known = ""
        for what, corrected in (
            ("left out", found.std * scaling_factor),
            ("applied twice", found.std / scaling_factor),
        ):
            if low <= corrected <= high:
                known = f"; they look as if the scaling factor had been {what} ({scaling_factor:g})"
        warnings.append(
            f"the standard deviation of all latents is {found.std:.3g}, expected {low:g} to {high:g}{known}"
        )
    for index, channel in enumerate(statistics.channels):
        if abs(channel.mean) > MEAN_LIMIT:
            limits = f"{-MEAN_LIMIT:g} to {MEAN_LIMIT:g}"
            warnings.append(f"the mean of channel {index} is {channel.mean:.3g}, expected {limits}")
        if channel.std < CHANNEL_STD_LIMIT:
            warnings.append(
                f"channel {index} is nearly constant: its standard deviation is {channel.std:.3g}"
            )
    if rows := statistics.constant_rows:
        warnings.append(f"{_listed(rows, 'row')} with one and the same number everywhere: never written?")
    if len(statistics.per_class) > classes:
        warnings.append(f"labels up to {len(statistics.per_class) - 1}, but data.classes is {classes}")
    if len(missing := np.flatnonzero(statistics.per_class == 0)):
        named = [names[label] if label < len(names) else str(label) for label in missing]
        warnings.append(f"no latents of {_listed(named, 'class', 'classes')}")
    return warnings


def _listed(things: Sequence[Any], one: str, many: str = "rows") -> str:
    """`3 rows (4, 7, 9)`, of which the first few are named."""
    named = ", ".join(map(str, things[:_NAMED])) + (", ..." if len(things) > _NAMED else "")
    return f"{len(things)} {one if len(things) == 1 else many} ({named})"


def histogram_picture(statistics: LatentStatistics) -> Image.Image:
    """The distribution of each channel, with the unit normal for comparison."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spread = 4 * max([1.0, *(abs(c.mean) / 4 + c.std for c in statistics.channels if not math.isnan(c.std))])
    edges = np.linspace(-spread, spread, 161)
    middles = (edges[1:] + edges[:-1]) / 2
    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    for index, channel in enumerate(statistics.channels):
        label = f"channel {index}: mean {channel.mean:.2f}, std {channel.std:.2f}"
        axes.plot(middles, channel.density(edges), linewidth=1.5, label=label)
    normal = np.exp(-(middles**2) / 2) / math.sqrt(2 * math.pi)
    axes.plot(middles, normal, color="0.4", linestyle="--", linewidth=1.2, label="unit normal")
    # By the root, so that a channel with a narrow peak leaves the others visible
    axes.set_yscale("function", functions=(np.sqrt, np.square))
    axes.set(xlim=(-spread, spread), xlabel="latent value", ylabel="density (square-root axis)")
    axes.set(ylim=(0, None), title=f"all: {statistics.all}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=1 + len(statistics.channels) // 9)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def inspect_latents(
    folder: str | Path,
    settings: Settings,
    out: str | Path,
    look: Look = Look(),  # noqa: B008 (frozen)
    *,
    view: str | None = None,
    progress: bool = False,
) -> Inspection:
    """Decode random latents of `folder` and measure all of them.

    Writes `latents.png`, `histogram.png` and `meta.json` into `out`. With `look.compare`, each decoded latent
    has the centre view of its image below it; where that is what was encoded, the two are compared. `view` is
    what the latents must be of, None for any. Raises `UserError` if a file is missing, damaged, changed since
    it was written or not of these settings, if the images are not those that were encoded, or if `out` cannot
    be written.
    """
    latents = Latents(folder, settings, look, view)
    out, store, classes = prepare_out(out, folder), latents.store, settings.data.classes
    statistics = measure_latents(store, max(classes, store.num_classes), progress=progress)
    warnings = latent_warnings(statistics, latents.vae.scaling_factor, classes, store.class_names)
    lines = [
        f"latents:     {store.folder}, {len(store)} of {'x'.join(map(str, store.shape[1:]))}, "
        f"view {store.meta.get('view', 'unknown')}",
        f"all:         {statistics.all}",
        *(f"channel {index}:   {channel}" for index, channel in enumerate(statistics.channels)),
        f"classes:     {len(statistics.per_class)} with {statistics.per_class.min()} to "
        f"{statistics.per_class.max()} rows, median {np.median(statistics.per_class):g}",
    ]
    rows = latents.choose(np.arange(len(store)), look.count, "inspect/latents")
    kinds = {"decoded": latents.decoded(store.rows(rows)), **latents.source_pictures(rows)}
    differences = {}
    if latents.sources is not None and latents.sources.exact and len(rows) > 1:
        own, other = (
            _rms(kinds["decoded"], np.roll(kinds["source"], by, axis=0)) for by in (0, len(rows) // 2)
        )
        differences = {"own": own, "unrelated": other}
        levels = f"{own:.1f} levels of 255 (RMS), and by {other:.1f} from other images"
        lines.append(f"difference:  from their images by {levels}")
        if own > other / 2:
            warnings.append(
                f"the decoded latents differ from their images by {levels}: they are not of these images, "
                "or not of this VAE"
            )
    shown = latents.described_rows(rows)
    meta = {
        **latents.described(),
        "settings": {"count": look.count, "seed": look.seed, "classes": classes},
        "statistics": statistics.as_json(),
        "difference_from_source": differences,
        "shown": shown,
    }
    captions = [f"{each['class']}  #{each['row']}" for each in shown]
    pictures = {"latents.png": bands(kinds, captions), "histogram.png": histogram_picture(statistics)}
    return Inspection(lines, warnings).write(out, pictures, meta)


def _rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))
