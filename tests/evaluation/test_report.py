"""The table on screen says what the metrics file says."""

from drift.evaluation.report import format_report

RESULT = {
    "best": {"omega": 1.5, "fid": 2.0, "accuracy": 0.97},
    "sweep": [{"omega": 1.0, "fid": 3.25, "accuracy": 0.9}, {"omega": 1.5, "fid": 2.0, "accuracy": 0.97}],
    "floor": 1.5,
    "images": 100,
    "classifier_accuracy_real": 0.99,
    "protocol": {"features": "some/folder"},
}


def test_a_row_per_omega_and_the_best_marked():
    lines = format_report(RESULT).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert "(best)" not in lines[2] and "3.25" in lines[2] and "90.0%" in lines[2]
    assert "1.5 (best)" in lines[3] and "97.0%" in lines[3]
    assert "floor" in lines[-2] and "1.50" in lines[-2]


def test_without_a_classifier_and_a_floor():
    sweep = [{"omega": 1.0, "fid": 3.25}]
    changes = {"best": sweep[0], "sweep": sweep, "floor": None, "classifier_accuracy_real": None}
    text = format_report(RESULT | changes)
    assert "3.25" in text and "floor" not in text and "accuracy on real" not in text
