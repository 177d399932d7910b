"""The report of one run: one page with numbers, curves, pictures and settings, and nothing to fetch."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift.evaluation.report import COLUMNS
from drift.runtime.files import atomic_write
from drift.runtime.progress import read_log

_TEMPLATE = "page.html.j2"
_CURVES = (
    ("fid", "FID", "Lower is better."),
    ("kid", "KID", "Lower is better; around 0 it may be negative, as the estimate is unbiased."),
    ("inception_score", "Inception Score", "Higher is better, up to the number of classes."),
    ("precision", "Precision", "Share of samples that lie where real images do."),
    ("recall", "Recall", "Share of real images that lie where samples do."),
    ("accuracy", "Accuracy", "Share of samples in which the classifier reads the class that was asked for."),
)

_TICKS = {"axes.formatter.useoffset": False}  # numbers as they are, not their differences from another


@dataclass(frozen=True)
class Curve:
    """One plot: lines by name, of which a single one may be unnamed."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    """Name -> (x, y)."""
    reference: tuple[str, float] | None = None
    """Name and height of a dashed line."""
    log_y: bool = False
    explanation: str = ""


def training_curves(log: Path) -> list[Curve]:
    """What the generator's log has to show; nothing for one that no stage of ours has trained."""
    lines = [line for line in read_log(log) if {"loss", "drift_rms"} <= line.keys()] if log.exists() else []
    steps = [line["step"] for line in lines]
    shown = (
        ("drift_rms", "RMS of the raw drift", "Falls while the generator learns.", True),
        ("loss", "Loss", "Nearly constant by construction: each drift is divided by its RMS.", False),
    )
    return [
        Curve(
            title=title,
            x_label="step",
            y_label=name,
            lines={"": (steps, [line[name] for line in lines])},
            log_y=log_y,
            explanation=explanation,
        )
        for name, title, explanation, log_y in shown
        if lines
    ]


def sweep_curves(result: Mapping[str, Any]) -> list[Curve]:
    """A plot over omega for each metric of the entries, with a line for each EMA decay.

    `result` is what `metrics/fid.json` holds.
    """
    curves = []
    for name, title, explanation in _CURVES:
        entries = [entry for entry in result["sweep"] if entry.get(name) is not None]
        decays = list(dict.fromkeys(entry.get("ema_decay") for entry in entries))
        lines = {}
        for decay in decays:
            points = sorted((e["omega"], e[name]) for e in entries if e.get("ema_decay") == decay)
            label = f"EMA {decay:g}" if len(decays) > 1 and decay is not None else ""
            lines[label] = tuple(zip(*points, strict=True))
        reference = None
        if name == "fid" and result.get("training") is not None:
            reference = ("real training images", result["training"])
        elif name == "accuracy" and result.get("classifier_accuracy_real") is not None:
            reference = ("real images", result["classifier_accuracy_real"])
        if lines:
            curves.append(Curve(title, "omega", title, lines, reference, explanation=explanation))
    return curves


def render_page(
    result: Mapping[str, Any],
    *,
    title: str,
    settings: Mapping[str, Any],
    pictures: Sequence[tuple[str, str, bytes]],
    training: Sequence[Curve] = (),
) -> str:
    """The page as HTML: equal arguments give equal text.

    `pictures` are (title, explanation, PNG bytes), `training` the curves of the run that made the generator,
    `settings` what decided it; `result` is what `metrics/fid.json` holds.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [c for c in COLUMNS if any(entry.get(c[0]) is not None for entry in result["sweep"])]
    rows = [
        (
            entry == result["best"],
            ["–" if entry.get(key) is None else format(entry[key], form) for key, _, form in shown],
        )
        for entry in result["sweep"]
    ]
    curves = [*sweep_curves(result), *training]
    drawn = [(curve, _svg(curve, f"curve{number}")) for number, curve in enumerate(curves)]
    count = len(curves) - len(training)
    return environment.get_template(_TEMPLATE).render(
        result=result,
        title=title,
        columns=[name for _, name, _ in shown],
        rows=rows,
        sweep=drawn[:count],
        training=drawn[count:],
        pictures=[
            (name, explanation, base64.b64encode(png).decode(), _png_width(png))
            for name, explanation, png in pictures
        ],
        protocol=_flatten(result["protocol"]),
        settings=_flatten(settings),
        half=(result["protocol"].get("reference_images") or 0) // 2,
    )


def write_page(path: str | Path, result: Mapping[str, Any], **parts: Any) -> None:
    """Write `render_page` atomically."""
    text = render_page(result, **parts)
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def _png_width(png: bytes) -> int:
    return int.from_bytes(png[16:20], "big")  # of the header that every PNG begins with


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value) of nested settings."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            rows.append((prefix + key, ", ".join(map(str, value))))
        else:
            rows.append((prefix + key, "–" if value is None else str(value)))
    return rows


def _svg(curve: Curve, prefix: str) -> str:
    """A plot as SVG without date; `prefix` tells its ids from those of other plots of the page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": prefix, "svg.fonttype": "none", "font.size": 11, **_TICKS}):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for name, (x, y) in curve.lines.items():
            axes.plot(x, y, marker="o" if len(x) < 30 else None, markersize=4, label=name or None)
        if curve.reference is not None:
            axes.axhline(
                curve.reference[1], color="0.4", linestyle="--", linewidth=1, label=curve.reference[0]
            )
        if curve.log_y:
            axes.set_yscale("log")
        axes.set_xlabel(curve.x_label)
        axes.set_ylabel(curve.y_label)
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if any(curve.lines) or curve.reference is not None:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for before in (' id="', "url(#", 'href="#'):
        text = text.replace(before, f"{before}{prefix}-")
    return text
