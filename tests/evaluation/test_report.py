"""The table on screen says what the metrics file says."""

import json
from pathlib import Path

from drift.evaluation.report import format_report, print_report

RESULT = {
    "best": {"omega": 1.5, "fid": 2.0, "accuracy": 0.97},
    "sweep": [{"omega": 1.0, "fid": 3.25, "accuracy": 0.9}, {"omega": 1.5, "fid": 2.0, "accuracy": 0.97}],
    "floor": 1.5,
    "training": 1.25,
    "images": 100,
    "classifier_accuracy_real": 0.99,
    "protocol": {"features": "some/folder", "reference_images": 40, "floor_images": 70},
}


def test_a_row_per_omega_and_the_best_marked():
    lines = format_report(RESULT).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert "(best)" not in lines[2] and "3.25" in lines[2] and "90.0%" in lines[2]
    assert "1.5 (best)" in lines[3] and "97.0%" in lines[3]
    assert "floor" in lines[-3] and "20 images" in lines[-3] and "1.50" in lines[-3]
    assert "70 real" in lines[-2] and "1.25" in lines[-2]
    assert "KID" not in lines[0]


def test_what_was_measured_beside_has_columns():
    entry = {"omega": 1.0, "ema_decay": 0.999, "fid": 3.25, "kid": 0.00123, "precision": 0.5, "recall": 0.25}
    lines = format_report(RESULT | {"best": entry, "sweep": [entry]}).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "omega",
        "EMA",
        "FID",
        "KID",
        "precision",
        "recall",
    ]
    assert "0.00123" in lines[2] and "0.999" in lines[2]


def test_every_file_is_named_for_what_it_is(tmp_path, capsys):
    (tmp_path / "fid.json").write_text(json.dumps(RESULT))
    print_report(tmp_path / "fid.json", map(Path, ("a.csv", "a.json", "a.png", "a.html")), "png")
    lines = capsys.readouterr().out.splitlines()[-6:]
    assert [line.split()[0] for line in lines] == [
        "numbers:", "curve:", "sweep:", "picture:", "report:", "images:"
    ]  # fmt: skip


def test_without_a_classifier_and_a_floor():
    sweep = [{"omega": 1.0, "fid": 3.25}]
    changes = {
        "best": sweep[0],
        "sweep": sweep,
        "floor": None,
        "training": None,
        "classifier_accuracy_real": None,
    }
    text = format_report(RESULT | changes)
    assert "3.25" in text and "floor" not in text and "accuracy on real" not in text
