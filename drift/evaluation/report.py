"""The numbers of `reports/protocol.json` as a table on screen.

python -m drift.evaluation.report
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    ("omega", "omega", "g"),
    ("ema_decay", "EMA", "g"),
    ("fid", "FID", ".2f"),
    ("kid", "KID", ".5f"),
    ("inception_score", "IS", ".2f"),
    ("precision", "precision", ".3f"),
    ("recall", "recall", ".3f"),
    ("accuracy", "accuracy", ".1%"),
)


def table(measured: Mapping[str, Any]) -> list[list[str]]:
    """The titles of the measured columns, and a row per point of the sweep; `measured` is `protocol.json`."""
    shown = [c for c in COLUMNS if any(entry.get(c[0]) is not None for entry in measured["sweep"])]
    rows = [[title for _, title, _ in shown]]
    for entry in measured["sweep"]:
        row = [format(entry[key], form) if entry.get(key) is not None else "-" for key, _, form in shown]
        rows.append([row[0] + (" (best)" if entry == measured["best"] else ""), *row[1:]])
    return rows


def comparisons(measured: Mapping[str, Any]) -> list[str]:
    """What the numbers of the table are of, and what they are to be compared with, a line each."""
    protocol = measured["protocol"]
    lines = [f"{measured['images']} images per row, features of {protocol['features']}"]
    if measured["floor"] is not None:
        half = protocol["reference_images"] // 2
        lines.append(f"FID floor (two halves of the reference, {half} images each): {measured['floor']:.2f}")
    if measured["training"] is not None:
        count = protocol["floor_images"]
        lines.append(f"FID of {count} real training images, as if generated: {measured['training']:.2f}")
    if measured["classifier_accuracy_real"] is not None:
        lines.append(f"the classifier's accuracy on real images: {measured['classifier_accuracy_real']:.1%}")
    return lines


def format_report(measured: Mapping[str, Any]) -> str:
    """`table` in Markdown, and `comparisons` below."""
    return "\n".join([markdown(table(measured)), "", *comparisons(measured)])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table, the first of them as its titles."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def print_report(protocol: Path, files: Iterable[Path], png_folder: str | None = None) -> None:
    """Print `protocol` as a table, then where the files are."""
    print(f"\n{format_report(json.loads(protocol.read_text()))}\n")
    kinds = {".png": "picture:  ", ".html": "report:   ", ".json": "numbers:  ", ".csv": "curve:    "}
    for path in files:
        print(kinds[path.suffix], path)
    if png_folder is not None:
        print("images:   ", png_folder)


if __name__ == "__main__":
    plots = sorted(path for path in Path("plots").glob("*") if path.suffix in (".png", ".csv"))
    files = (Path("metrics/fid.json"), *plots, Path("reports/index.html"))
    print_report(Path("reports/protocol.json"), files)
