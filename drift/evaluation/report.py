"""The numbers of `metrics/fid.json` as a table on screen.

python -m drift.evaluation.report
"""

import json
from collections.abc import Iterable
from pathlib import Path

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


def format_report(result: dict) -> str:
    """A Markdown table with a row per point of the sweep, and what the numbers are to be compared with.

    `result` is what `metrics/fid.json` holds.
    """
    shown = [c for c in COLUMNS if any(entry.get(c[0]) is not None for entry in result["sweep"])]
    rows = [[title for _, title, _ in shown]]
    for entry in result["sweep"]:
        row = [format(entry[key], form) if entry.get(key) is not None else "-" for key, _, form in shown]
        if entry == result["best"]:
            row[0] += " (best)"
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(shown))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    protocol = result["protocol"]
    lines += ["", f"{result['images']} images per row, features of {protocol['features']}"]
    if result["floor"] is not None:
        half = protocol["reference_images"] // 2
        lines.append(f"FID floor (two halves of the reference, {half} images each): {result['floor']:.2f}")
    if result["training"] is not None:
        count = protocol["floor_images"]
        lines.append(f"FID of {count} real training images, as if generated: {result['training']:.2f}")
    if result["classifier_accuracy_real"] is not None:
        lines.append(f"the classifier's accuracy on real images: {result['classifier_accuracy_real']:.1%}")
    return "\n".join(lines)


def print_report(metrics: Path, files: Iterable[Path], png_folder: str | None = None) -> None:
    """Print `metrics` as a table, then where it and the other files are."""
    print(f"\n{format_report(json.loads(metrics.read_text()))}\n")
    print("numbers:  ", metrics)
    kinds = {".png": "picture:  ", ".html": "report:   ", ".json": "sweep:    "}
    for path in files:
        print(kinds.get(path.suffix, "curve:    "), path)
    if png_folder is not None:
        print("images:   ", png_folder)


if __name__ == "__main__":
    plots = sorted(path for path in Path("plots").glob("*") if path.suffix in (".png", ".csv"))
    print_report(Path("metrics/fid.json"), [*plots, Path("reports/index.html")])
