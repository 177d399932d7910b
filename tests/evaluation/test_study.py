"""Statistics of a study against SciPy's, and what counts of DVC's experiments.

`experiments.json` is what `dvc exp show --json` of DVC 3.67 printed of a project of two stages, without the
paths of its logs: couplings over seeds, a baseline run twice, two failed experiments and one in the queue,
and one after a change of a script.
"""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from drift.evaluation.study import Spread, groups, names, other_sources, read_experiments, table, verdict

RECORDED = json.loads(Path(__file__).with_name("experiments.json").read_text())
BASELINE = "partial_two_sided"


@pytest.fixture
def shown():
    return copy.deepcopy(RECORDED)


def of(shown, name):
    """What DVC shows of one experiment."""
    (found,) = (one["revs"][0]["data"] for one in shown[1]["experiments"] if one["name"] == name)
    return found


def by_coupling(runs):
    return {dict(settings)["coupling"]: of_settings for settings, of_settings in runs.items()}


@pytest.mark.parametrize(
    "numbers", [[1.0, 2.0, 3.0], [0.4, 0.41], list(np.random.default_rng(0).normal(size=9))]
)
def test_intervals_are_those_of_scipy(numbers):
    spread = Spread.of(numbers)
    assert spread == pytest.approx((np.mean(numbers), np.std(numbers, ddof=1), len(numbers)))
    expected = scipy.stats.t.interval(0.95, len(numbers) - 1, np.mean(numbers), scipy.stats.sem(numbers))
    assert spread.interval() == pytest.approx(expected)


def test_an_interval_by_hand():
    """t of two degrees of freedom is 4.3027, the standard deviation 1."""
    assert Spread.of([1.0, 2.0, 3.0]).interval() == pytest.approx(
        (2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3))
    )


LOW, NEAR, HIGH = Spread.of([1.0, 2.0, 3.0]), Spread.of([5.0, 6.0, 7.0]), Spread.of([7.0, 8.0, 9.0])


@pytest.mark.parametrize(
    ("metric", "one", "other", "expected"),
    [
        ("fid", LOW, HIGH, "better"),
        ("fid", HIGH, LOW, "worse"),
        ("kid", LOW, HIGH, "better"),
        ("accuracy", LOW, HIGH, "worse"),
        ("recall", HIGH, LOW, "better"),
        ("omega", LOW, HIGH, "lower"),
        ("omega", HIGH, LOW, "higher"),
        ("fid", LOW, NEAR, "inconclusive"),  # 2 + 2.48 > 6 - 2.48
        ("fid", LOW, LOW, "inconclusive"),
        ("fid", LOW, Spread.of([8.0]), "one seed"),
        ("fid", Spread.of([8.0]), LOW, "one seed"),
        ("fid", Spread.of([0.5, 0.5]), Spread.of([0.5, 0.5]), "inconclusive"),
        ("fid", Spread.of([0.4, 0.4]), Spread.of([0.5, 0.5]), "better"),
    ],
)
def test_verdicts(metric, one, other, expected):
    assert verdict(metric, one, other) == expected


def test_what_was_measured_counts_once_for_each_seed(shown):
    found = read_experiments(shown)
    assert found.left_out == {"failed": 2, "queued": 1}  # which show the metrics of the commit, or none
    runs = by_coupling(groups(found, {}))
    seeds = {coupling: [run.seed for run in of_one] for coupling, of_one in runs.items()}
    assert seeds == {BASELINE: [7, 8, 0], "row": [0, 1, 2, 4], "sinkhorn": [0, 1, 2], "single": [0]}
    assert next(iter(runs)) == BASELINE
    expected = [run["data"]["metrics"]["metrics/fid.json"]["data"]["fid"]
                for one in shown[1]["experiments"] for run in one["revs"]
                if run["data"]["params"]["params.yaml"]["data"]["coupling"] == "sinkhorn"]  # fmt: skip
    assert sorted(run.metrics["fid"] for run in runs["sinkhorn"]) == sorted(expected)
    assert other_sources(found.runs) == ["measure.py"]
    assert other_sources(runs["sinkhorn"]) == []


def test_a_table_of_them(shown):
    found = read_experiments(shown)
    titles, *rows = table(groups(found, {"coupling": "sinkhorn"}), ["fid", "accuracy"])
    assert titles == ["settings", "seeds", "fid", "accuracy"]
    assert [row[:2] for row in rows] == [
        ["coupling=sinkhorn", "3"],
        ["coupling=row", "4"],
        ["coupling=partial_two_sided", "3"],
        ["coupling=single", "1"],
    ]
    fids = [run.metrics["fid"] for run in by_coupling(groups(found, {}))["sinkhorn"]]
    assert rows[0][2] == f"{np.mean(fids):.4g} ± {np.std(fids, ddof=1):.2g}"
    verdicts = [[cell.partition(", ")[2] for cell in row[2:]] for row in rows]
    assert verdicts == [["", ""], ["worse", "worse"], ["inconclusive"] * 2, ["one seed"] * 2]


def test_the_first_row_has_the_settings_of_the_commit_or_else_of_the_workspace(shown):
    def first(shown):
        return next(iter(by_coupling(groups(read_experiments(shown), {}))))

    shown[0]["data"]["params"]["params.yaml"]["data"]["coupling"] = "sinkhorn"
    assert first(shown) == BASELINE
    shown[1]["data"]["params"]["params.yaml"]["data"]["coupling"] = "unheard-of"
    assert first(shown) == "sinkhorn"
    shown[0]["data"] = None  # params.yaml is no YAML
    assert first(shown) == "row"  # the oldest


def test_runs_without_a_metric_and_runs_that_were_repeated(shown):
    of(shown, "based-buoy")["metrics"] = {}
    del of(shown, "caped-soke")["metrics"]["metrics/fid.json"]["data"]["accuracy"]
    of(shown, "pawky-beak")["metrics"]["metrics/fid.json"]["data"]["fid"] = 0.25  # newer than union-yegg
    found = read_experiments(shown)
    assert found.left_out == {
        **{"failed": 2, "queued": 1, "without metrics": 1},
        "repeated later with other metrics": 1,
    }
    runs = by_coupling(groups(found, {}))
    assert [run.metrics["fid"] for run in runs[BASELINE] if run.seed == 0] == [0.25]
    rows = {row[0]: row for row in table(groups(found, {}), ["fid", "accuracy", "kid"])}
    _, seeds, fid, accuracy, kid = rows["coupling=sinkhorn"]
    assert (seeds, kid) == ("2", "-") and "of" not in fid
    assert accuracy == "0.9316 (1 of 2), one seed"
    for name in ("savvy-zest", "typic-wise", "union-yegg", "pawky-beak"):
        del of(shown, name)["metrics"]["metrics/fid.json"]["data"]["fid"]
    first, *others = [row[2] for row in table(groups(read_experiments(shown), {}), ["fid"])[1:]]
    assert first == "-" and not any("," in cell for cell in others)  # there is nothing to judge against


def test_hardware_is_no_setting_and_what_is_left_out_is_unset(shown):
    of(shown, "slier-acid")["params"]["params.yaml"]["data"] |= {"hardware": {"prefetch": 0}}
    of(shown, "tipsy-scud")["params"]["params.yaml"]["data"] |= {"drift": {"steps": 20, "patch": 4}}
    runs = groups(read_experiments(shown), {})
    assert names(runs)[0] == "coupling=partial_two_sided, drift.patch unset, drift.steps=10"
    assert "coupling=single, drift.patch=4, drift.steps=20" in names(runs)
    assert len(by_coupling(runs)["row"]) == 4
    (only,) = [settings for settings in runs if dict(settings)["coupling"] == "row"]
    assert names([only]) == ["all"]
