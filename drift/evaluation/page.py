"""The report of one run: a page with its numbers, curves, pictures and settings that fetches nothing."""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from drift.evaluation.report import COLUMNS, comparisons, table
from drift.runtime.progress import read_log

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark }} h1 {{ font-size: 1.6rem; overflow-wrap: anywhere }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .4rem; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap }}
body {{ margin: auto; padding: 1rem; max-width: 75rem; font: 16px/1.5 system-ui, sans-serif }}
img {{ max-width: 100%; height: auto; background: #fff }}
</style></head><body>
<h1>{title}</h1>
<div class="wide"><table>
{table}
</table></div>
<p>{comparisons}</p>
{images}
<h2>How it was measured</h2>
<pre>{protocol}</pre>
<details><summary>Settings</summary><pre>{settings}</pre></details>
</body></html>
"""
Curve = tuple[str, str, Sequence[tuple[float, float]], str]
"""Title, label of the x axis, points, label of the line."""


def render_page(
    measured: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    training_log: Path,
) -> str:
    """The page as HTML: equal arguments give equal text.

    `measured` is what `protocol.json` holds, `settings` what the generator was made with, `pictures` are PNG
    files by title; `training_log` is the generator's `logs.jsonl`, which may be missing.
    """
    curves = _plot(list(_curves(measured["sweep"], read_log(training_log))))
    images = {**pictures, "Over omega, and over the steps of training": curves}
    embedded = {title: base64.b64encode(png).decode() for title, png in images.items()}
    how = {"protocol": measured["protocol"], "self-test of the reference": measured["self_test"]}
    return _PAGE.format(
        title=escape(f"{measured['protocol']['generator_folder']}: {measured['images']} images per omega"),
        table="\n".join(_rows(table(measured))),
        comparisons="<br>\n".join(map(escape, comparisons(measured))),
        images="\n".join(
            f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/png;base64,{data}">'
            for title, data in embedded.items()
        ),
        protocol=escape(json.dumps(how, indent=2, ensure_ascii=False)),
        settings=escape(json.dumps(settings, indent=2, ensure_ascii=False, default=str)),
    )


def _rows(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    for number, row in enumerate(cells):
        tag = "td" if number else "th"
        yield "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"


def _curves(sweep: Sequence[Mapping[str, Any]], log: Sequence[Mapping[str, Any]]) -> Iterator[Curve]:
    decays = list(dict.fromkeys(entry["ema_decay"] for entry in sweep))
    for key, title, _ in COLUMNS[2:]:
        for decay in decays:
            entries = [e for e in sweep if e.get(key) is not None and e["ema_decay"] == decay]
            name = f"EMA {decay:g}" if len(decays) > 1 else ""
            yield title, "omega", sorted((e["omega"], e[key]) for e in entries), name
    of_training = {"drift_rms": "RMS of the raw drift", "loss": "loss", "fid": "Fréchet distance"}
    for key, name in of_training.items():
        title = f"{name} (training)"
        yield title, "step", [(line["step"], line[key]) for line in log if key in line], ""


def _plot(curves: Sequence[Curve]) -> bytes:
    """A PNG with a panel per title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = [curve for curve in curves if curve[2]]
    titles = list(dict.fromkeys(curve[0] for curve in curves))
    rows = -(-len(titles) // 3)
    figure = Figure(figsize=(12, 3 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = {title: figure.add_subplot(rows, 3, 1 + number) for number, title in enumerate(titles)}
    for title, x_label, points, name in curves:
        axes[title].plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=name)
        axes[title].set(title=title, xlabel=x_label)
        axes[title].ticklabel_format(useOffset=False)
        axes[title].grid(alpha=0.3)
        if name:
            axes[title].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
