"""Latents: do they look like those of the VAE, and like their images?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from drift.data.latents import LatentStore
from drift.evaluation.inspect_reading import SourceImages, choose, open_latents, open_vae, view_of
from drift.evaluation.inspect_writing import (
    NAMED,
    Inspection,
    bands,
    caption,
    decoded,
    describe_latents,
    describe_row,
    finite_or_none,
    listed,
    png_bytes,
    prepare_out,
    write_inspection,
)
from drift.evaluation.sample import ImageDecoder
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
"""Below this a channel says nothing; the smallest at hand is 0.19, of the VAE of the digits."""
_BLOCK = 2**22  # numbers that are held at once while the statistics are made


class Distribution:
    """How often each value occurs among float16 numbers: one number per bit pattern, hence nothing is lost.

    Mean and standard deviation (population), minimum and maximum are those of the finite numbers, in float64
    and NaN where there are none.
    """

    _VALUES = np.arange(2**16).astype(np.uint16).view(np.float16).astype(np.float64)
    _FINITE = np.flatnonzero(np.isfinite(_VALUES))

    def __init__(self, counts: np.ndarray | None = None):
        """`counts` `[65536]` int64 by bit pattern; none yet without them."""
        self.counts = np.zeros(2**16, np.int64) if counts is None else counts

    def add(self, values: np.ndarray) -> None:
        """Count float16 `values` of any shape."""
        self.counts += np.bincount(values.reshape(-1).view(np.uint16), minlength=2**16)

    @property
    def nans(self) -> int:
        return int(self.counts[np.isnan(self._VALUES)].sum())

    @property
    def infinities(self) -> int:
        return int(self.counts[np.isinf(self._VALUES)].sum())

    @cached_property
    def _present(self) -> tuple[np.ndarray, np.ndarray]:
        """The finite values that occur, and how often."""
        counts = self.counts[self._FINITE]
        return self._VALUES[self._FINITE][counts > 0], counts[counts > 0]

    @property
    def mean(self) -> float:
        values, counts = self._present
        return float(values @ counts / counts.sum()) if len(values) else math.nan

    @property
    def std(self) -> float:
        values, counts = self._present
        return math.sqrt((values - self.mean) ** 2 @ counts / counts.sum()) if len(values) else math.nan

    @property
    def min(self) -> float:
        return float(self._present[0].min(initial=math.inf)) if len(self._present[0]) else math.nan

    @property
    def max(self) -> float:
        return float(self._present[0].max(initial=-math.inf)) if len(self._present[0]) else math.nan

    def density(self, edges: np.ndarray) -> np.ndarray:
        """The histogram over bins with `edges` `[n + 1]`, `[n]`: its integral is the share within them."""
        values, counts = self._present
        histogram, _ = np.histogram(values, edges, weights=counts)
        return histogram / (max(1, counts.sum()) * np.diff(edges))


@dataclass(frozen=True)
class LatentStatistics:
    """Numbers about all latents of a store."""

    channels: list[Distribution]
    not_finite_rows: list[int]
    """Rows with a NaN or an infinity."""
    constant_rows: list[int]
    """Rows whose numbers are all the same."""
    per_class: np.ndarray
    """Rows of each class, `[classes]`."""

    @cached_property
    def all(self) -> Distribution:
        """All channels together."""
        return Distribution(sum(channel.counts for channel in self.channels))

    def as_json(self) -> dict[str, Any]:
        """For `meta.json`; a number that is not finite is null."""

        def numbers(found: Distribution) -> dict[str, Any]:
            return {name: finite_or_none(getattr(found, name)) for name in ("mean", "std", "min", "max")} | {
                "nans": found.nans,
                "infinities": found.infinities,
            }

        return {
            "all": numbers(self.all),
            "channels": [numbers(channel) for channel in self.channels],
            "not_finite_rows": {"count": len(self.not_finite_rows), "first": self.not_finite_rows[:NAMED]},
            "constant_rows": {"count": len(self.constant_rows), "first": self.constant_rows[:NAMED]},
            "rows_per_class": {
                "min": int(self.per_class.min()),
                "median": float(np.median(self.per_class)),
                "max": int(self.per_class.max()),
                "classes_without_any": np.flatnonzero(self.per_class == 0).tolist(),
            },
        }


def measure_latents(store: LatentStore, classes: int, *, progress: bool = False) -> LatentStatistics:
    """Statistics of all latents in one pass, with some tens of megabytes of memory however many there are.

    `classes` is how many there should be. Raises `UserError` if the file cannot be read any more.
    """
    channels = [Distribution() for _ in range(store.shape[1])]
    not_finite: list[int] = []
    constant: list[int] = []
    step = max(1, _BLOCK // math.prod(store.shape[1:]))
    with tqdm(total=len(store), desc="latents", unit="row", disable=not progress) as bar:
        for start in range(0, len(store), step):
            block = store.read(np.arange(start, min(start + step, len(store)))).numpy()  # [b, C, H, W]
            for index, channel in enumerate(channels):
                channel.add(block[:, index])
            bits = block.reshape(len(block), -1).view(np.uint16)
            finite = np.isfinite(block).reshape(len(block), -1).all(1)
            same = (bits == bits[:, :1]).all(1) & finite
            not_finite += (start + np.flatnonzero(~finite)).tolist()
            constant += (start + np.flatnonzero(same)).tolist()
            bar.update(len(block))
    per_class = np.bincount(store.labels, minlength=classes)
    return LatentStatistics(channels, not_finite, constant, per_class)


def latent_warnings(
    statistics: LatentStatistics, scaling_factor: float, classes: int, names: Sequence[str]
) -> list[str]:
    """What does not look like latents of a VAE with this `scaling_factor`, one line each.

    `classes` is how many the settings have, `names` are those of the classes as far as they have any.
    """
    said, found = [], statistics.all
    if rows := statistics.not_finite_rows:
        said.append(
            f"{found.nans} NaN and {found.infinities} infinite numbers in {listed(rows, 'row')}: "
            "encode the images again"
        )
    if not STD_RANGE[0] <= found.std <= STD_RANGE[1] and not math.isnan(found.std):
        hints = {
            "they look as if the scaling factor had been left out": found.std * scaling_factor,
            "they look as if the scaling factor had been applied twice": found.std / scaling_factor,
        }
        hint, corrected = min(hints.items(), key=lambda item: abs(math.log(item[1])) if item[1] else math.inf)
        known = f"; {hint} ({scaling_factor:g})" if STD_RANGE[0] <= corrected <= STD_RANGE[1] else ""
        said.append(
            f"the standard deviation of all latents is {found.std:.3g}, expected "
            f"{STD_RANGE[0]:g} to {STD_RANGE[1]:g}{known}"
        )
    for index, channel in enumerate(statistics.channels):
        if abs(channel.mean) > MEAN_LIMIT:
            said.append(
                f"the mean of channel {index} is {channel.mean:.3g}, "
                f"expected -{MEAN_LIMIT:g} to {MEAN_LIMIT:g}"
            )
        if channel.std < CHANNEL_STD_LIMIT:
            said.append(
                f"channel {index} has nearly one value only: its standard deviation is {channel.std:.3g}"
            )
    if rows := statistics.constant_rows:
        said.append(f"{listed(rows, 'row')} with one and the same number everywhere: was it ever written?")
    if len(statistics.per_class) > classes:
        said.append(f"labels up to {len(statistics.per_class) - 1}, but data.classes is {classes}")
    if len(missing := np.flatnonzero(statistics.per_class == 0)):
        named = [names[label] if label < len(names) else str(label) for label in missing]
        said.append(f"no latents of {listed(named, 'class', 'classes')}")
    return said


def histogram_picture(statistics: LatentStatistics) -> bytes:
    """A PNG of the distribution of each channel, with the unit normal for comparison."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = statistics.all
    spread = 4 * max([1.0, *(abs(c.mean) / 4 + c.std for c in statistics.channels if not math.isnan(c.std))])
    edges = np.linspace(-spread, spread, 161)
    middles = (edges[1:] + edges[:-1]) / 2
    figure = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, channel in enumerate(statistics.channels):
        label = f"channel {index}: mean {channel.mean:.2f}, std {channel.std:.2f}"
        axes.plot(middles, channel.density(edges), linewidth=1.5, label=label)
    normal = np.exp(-(middles**2) / 2) / math.sqrt(2 * math.pi)
    axes.plot(middles, normal, color="0.4", linestyle="--", linewidth=1.2, label="unit normal")
    # By the root, so that a channel with a narrow peak leaves the others visible
    axes.set_yscale("function", functions=(np.sqrt, np.square))
    axes.set_ylim(0)
    axes.set_xlim(-spread, spread)
    axes.set_xlabel("latent value")
    axes.set_ylabel("density (square-root axis)")
    axes.set_title(f"all: mean {found.mean:.3f}, std {found.std:.3f}, {found.min:.3g} to {found.max:.3g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=1 + len(statistics.channels) // 9)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def inspect_latents(
    folder: str | Path,
    settings: Settings,
    out: str | Path,
    *,
    view: str | None = None,
    count: int = 32,
    seed: int = 0,
    compare: bool = False,
    root: str | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Inspection:
    """Decode `count` random latents of `folder` and measure all of them.

    Writes `latents.png`, `histogram.png` and `meta.json` into `out`. With `compare`, each decoded latent has
    the centre view of its image below it, from `root` or else the settings' data; where that is what was
    encoded, the two are compared. `view` is what the latents must be of, None for any.

    Raises `UserError` if a file is missing, damaged, changed since it was written or not of these settings,
    if the images are not those that were encoded, or if `out` cannot be written.
    """
    store = open_latents(folder, settings, view)
    sources = SourceImages(store, settings, root) if compare else None
    vae = open_vae(store, settings, device)
    out = prepare_out(out, folder)

    classes = settings.data.classes
    statistics = measure_latents(store, max(classes, store.num_classes), progress=progress)
    rows = choose(np.arange(len(store)), count, seed, "inspect/latents")
    rows = rows[np.argsort(store.labels[rows], kind="stable")]
    decode = ImageDecoder(vae, min(len(rows), settings.hardware.decode_batch))
    kinds = {"decoded": decoded(decode, store.rows(rows))}
    warnings = latent_warnings(statistics, vae.scaling_factor, classes, store.class_names)
    own = unrelated = None
    if sources is not None:
        kinds["source"] = np.stack([sources.picture(int(row)) for row in rows])
        if sources.exact and len(rows) > 1:
            own = _rms(kinds["decoded"], kinds["source"])
            unrelated = _rms(kinds["decoded"], np.roll(kinds["source"], len(rows) // 2, axis=0))
            if own > unrelated / 2:
                warnings.append(
                    f"the decoded latents differ from their images by {own:.1f} levels of 255 (RMS), and by "
                    f"{unrelated:.1f} from other images: they are not of these images, or not of this VAE"
                )
    grid = bands(kinds, [caption(store, int(row)) for row in rows])
    shown = [describe_row(store, sources, int(row)) for row in rows]
    described = statistics.as_json()
    meta = {
        "latents": describe_latents(store),
        "vae": {"id": vae.id, "revision": vae.revision, "sha256": vae.digest},
        "images": None if sources is None else sources.described(),
        "settings": {"view": view_of(store), "count": count, "seed": seed, "classes": classes},
        "statistics": described,
        "difference_from_source": {"own": own, "unrelated": unrelated},
        "shown": shown,
        "warnings": warnings,
    }
    files = write_inspection(
        out, {"latents.png": png_bytes(grid), "histogram.png": histogram_picture(statistics)}, meta
    )
    lines = [
        f"latents:     {store.folder}, {len(store)} of {'x'.join(map(str, store.shape[1:]))}, "
        f"view {view_of(store) or 'unknown'}",
        f"all:         mean {statistics.all.mean:.4f}, std {statistics.all.std:.4f}, "
        f"{statistics.all.min:.4g} to {statistics.all.max:.4g}",
        *(
            f"channel {index}:   mean {channel.mean:.4f}, std {channel.std:.4f}, "
            f"{channel.min:.4g} to {channel.max:.4g}"
            for index, channel in enumerate(statistics.channels)
        ),
        _line_of_classes(described["rows_per_class"], len(statistics.per_class)),
    ]
    if own is not None:
        lines.append(
            f"difference:  {own:.1f} levels of 255 (RMS) from the images shown, "
            f"{unrelated:.1f} from one another's"
        )
    return Inspection(lines, warnings, files)


def _line_of_classes(per_class: Mapping[str, Any], classes: int) -> str:
    return (
        f"classes:     {classes} with {per_class['min']} to {per_class['max']} rows, median "
        f"{per_class['median']:g}, {len(per_class['classes_without_any'])} without any"
    )


def _rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))
