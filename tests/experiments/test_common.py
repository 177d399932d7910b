"""Optimal transport on clouds whose distance is known; tables; CSV."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from experiments.common import mean_and_std, read_csv, w2_squared, write_csv


def test_w2_of_a_shifted_cloud_is_the_square_of_the_shift():
    points = np.random.default_rng(0).normal(size=(50, 3))
    assert w2_squared(points, points[::-1] + np.array([3.0, 0.0, 4.0])) == pytest.approx(25)


def test_w2_splits_mass_where_the_numbers_of_points_differ():
    assert w2_squared(np.array([[0.0]]), np.array([[-1.0], [3.0]])) == pytest.approx((1 + 9) / 2)


def test_w2_is_the_best_assignment_of_as_many_points():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(60, 2)), rng.normal(1.0, 2.0, size=(60, 2))
    cost = np.square(x[:, None] - y[None]).sum(axis=2)
    assert w2_squared(x, y) == pytest.approx(cost[linear_sum_assignment(cost)].mean())


def test_a_solver_that_has_not_converged_is_an_error(monkeypatch):
    monkeypatch.setattr("experiments.common.MOST_ITERATIONS", 2)
    x = np.random.default_rng(0).normal(size=(2, 80, 2))
    with pytest.raises(ArithmeticError, match="numItermax"):
        w2_squared(*x)


def test_mean_and_standard_deviation_of_groups():
    rows = [{"a": 1, "v": 2.0}, {"a": 2, "v": 5.0}, {"a": 1, "v": 4.0}, {"a": 3, "v": None}]
    table = mean_and_std(rows, ["a"], ["v"])
    assert table == [
        {"a": 1, "runs": 2, "v_mean": 3.0, "v_std": pytest.approx(2**0.5)},
        {"a": 2, "runs": 1, "v_mean": 5.0, "v_std": 0.0},
        {"a": 3, "runs": 1, "v_mean": None, "v_std": None},
    ]


def test_csv_holds_what_was_written(tmp_path):
    rows = [
        {"name": "row", "eps": None, "seed": 3, "w2": 0.125},
        {"name": "x", "eps": 0.1, "seed": 4, "w2": 2.5},
    ]
    write_csv(tmp_path / "t.csv", rows)
    assert read_csv(tmp_path / "t.csv") == rows
