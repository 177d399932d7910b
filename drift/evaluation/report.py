"""The numbers of `metrics/fid.json` as a table on screen.

python -m drift.evaluation.report
"""

import json
from collections.abc import Sequence
from pathlib import Path


def format_report(result: dict) -> str:
    """A Markdown table with a row per omega, and under it what the numbers are to be compared with.

    `result` is what `metrics/fid.json` holds.
    """
    rows = [("omega", "FID", "accuracy")]
    for entry in result["sweep"]:
        accuracy = f"{entry['accuracy']:.1%}" if "accuracy" in entry else "-"
        mark = " (best)" if entry["omega"] == result["best"]["omega"] else ""
        rows.append((f"{entry['omega']:g}{mark}", f"{entry['fid']:.2f}", accuracy))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    protocol = result["protocol"]
    lines += ["", f"{result['images']} images per omega, features of {protocol['features']}"]
    if result["floor"] is not None:
        lines.append(f"floor (real training images against the same reference): {result['floor']:.2f}")
    if result["classifier_accuracy_real"] is not None:
        lines.append(f"the classifier's accuracy on real images: {result['classifier_accuracy_real']:.1%}")
    return "\n".join(lines)


def print_report(metrics: Path, pictures: Sequence[Path]) -> None:
    """Print `metrics` as a table, then where it and the pictures are."""
    print(f"\n{format_report(json.loads(metrics.read_text()))}\n")
    print("numbers:  ", metrics)
    for path in pictures:
        print("picture:  " if path.suffix == ".png" else "curve:    ", path)


if __name__ == "__main__":
    folder = Path("plots")
    pictures = sorted(folder.glob("*.png")) + sorted(folder.glob("*.csv"))
    print_report(Path("metrics/fid.json"), pictures)
