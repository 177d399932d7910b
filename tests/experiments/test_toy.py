"""The 2-D experiments against naive loops, closed forms and runs that were taken apart."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from imports import ROOT
from PIL import Image

from drift.field.couplings import COUPLINGS
from drift.runtime.errors import Stopped, UserError
from drift.runtime.processes import Ranks
from experiments.common import load_section, read_csv
from experiments.toy import figures, particles, train
from experiments.toy.field import field_settings, losses, velocity
from experiments.toy.networks import Networks
from experiments.toy.settings import Toy
from experiments.toy.targets import TARGETS, mode_coverage

TINY = """
seed: 5
seeds: 2
targets: [8gaussians, moons]
dist_metrics: [l2_sq]
couplings: [row, sinkhorn]
temps: [0.5]
network: {width: 8, blocks: 1}
train: {steps: 5, batch: 12, lr: 0.01, evaluate_every: 2, points: 20}
particles: {count: 12, steps: 20, temps: [1.0, 0.1], frames: 4}
"""


@pytest.fixture
def params(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path / "work"))
    path = tmp_path / "params.yaml"
    path.write_text(TINY)
    return path


def naive_rows(kernel: np.ndarray, coupling: str) -> np.ndarray:
    """The row-normalised plan of a kernel, by the paper's words."""
    if coupling == "sinkhorn":
        for _ in range(20):
            kernel = kernel / kernel.sum(axis=1, keepdims=True)
            kernel = kernel / kernel.sum(axis=0, keepdims=True)
    elif coupling == "partial_two_sided":
        kernel = np.sqrt(
            kernel / kernel.sum(axis=1, keepdims=True) * (kernel / kernel.sum(axis=0, keepdims=True))
        )
    return kernel / kernel.sum(axis=1, keepdims=True)


def naive_field(x: np.ndarray, y: np.ndarray, coupling: str, metric: str, eps: float) -> np.ndarray:
    """V = P(x, y) y - P(x, x) x, pair by pair in extended precision."""

    def kernel(targets: np.ndarray, itself: bool) -> np.ndarray:
        k = np.zeros((len(x), len(targets)), np.longdouble)
        for i in range(len(x)):
            for j in range(len(targets)):
                square = sum((a - b) ** 2 for a, b in zip(x[i], targets[j], strict=True))
                distance = square if metric == "l2_sq" else np.sqrt(square)
                k[i, j] = np.exp(-distance / eps)
        if itself and coupling != "sinkhorn":
            np.fill_diagonal(k, 0)
        return k

    to_y, to_x = naive_rows(kernel(y, False), coupling), naive_rows(kernel(x, True), coupling)
    v = np.zeros_like(x)
    for i in range(len(x)):
        for j in range(len(y)):
            v[i] += to_y[i, j] * y[j]
        for j in range(len(x)):
            v[i] -= to_x[i, j] * x[j]
    return v


@pytest.mark.parametrize("eps", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("metric", ["l2", "l2_sq"])
@pytest.mark.parametrize("coupling", ["row", "partial_two_sided", "sinkhorn"])
def test_the_field_and_the_loss_are_the_papers(coupling, metric, eps):
    rng = np.random.default_rng(3)
    x, y = (rng.normal(0, scale, (14, 2)).astype(np.longdouble) for scale in (0.6, 1.0))
    expected = naive_field(x, y, coupling, metric, eps).astype(np.float64)
    settings = field_settings(coupling, metric, eps)
    tensors = [torch.tensor(points.astype(np.float32)) for points in (x, y)]
    np.testing.assert_allclose(velocity(*tensors, settings), expected, atol=2e-4)
    loss = losses(*(points[None] for points in tensors), settings)
    assert loss.item() == pytest.approx(np.square(expected).mean(), rel=1e-4)


@pytest.mark.parametrize(("metric", "slope"), [("l2", 1), ("l2_sq", 2)])
def test_tau_scale_is_the_slope_of_the_kernel(metric, slope):
    x, y = torch.randn(2, 10, 2, generator=torch.Generator().manual_seed(0))
    plain = velocity(x, y, field_settings("row", metric, 0.3))
    scaled = velocity(x, y, field_settings("row", metric, 0.3, drift_tau_scale=True))
    torch.testing.assert_close(scaled, plain * slope / 0.3)


def in_scalars(name: str, rng: np.random.Generator, n: int) -> list[tuple[float, float]]:
    """A target drawn number by number in the order that the paper's code has."""
    if name == "moons":
        t = [rng.uniform(0, math.pi) for _ in range(n)]
        shape = [(math.cos(a), math.sin(a)) for a in t] + [(1 - math.cos(a), 0.5 - math.sin(a)) for a in t]
        shape, std = [shape[i] for i in rng.permutation(2 * n)][:n], 0.08
    elif name == "spiral":
        t = [rng.uniform(0, 4 * math.pi) for _ in range(n)]
        shape = [(2.5 * a / (4 * math.pi) * math.cos(a), 2.5 * a / (4 * math.pi) * math.sin(a)) for a in t]
        std = 0.05
    elif name == "checkerboard":
        shape, std = [], 0.05
        while len(shape) < n:
            pairs = [(rng.uniform(0, 4), rng.uniform(0, 4)) for _ in range(n)]
            shape += [(a - 2, b - 2) for a, b in pairs if (math.floor(a) + math.floor(b)) % 2 == 0]
        shape = shape[:n]
    elif name == "8gaussians":
        k = rng.integers(0, 8, n)
        shape, std = [(2 * math.cos(i * math.pi / 4), 2 * math.sin(i * math.pi / 4)) for i in k], 0.08
    else:
        shape, std = [(i // 5 - 2.0, i % 5 - 2.0) for i in rng.integers(0, 25, n)], 0.06
    return [(a + std * rng.standard_normal(), b + std * rng.standard_normal()) for a, b in shape]


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_drawn_in_the_papers_order(name):
    points = TARGETS[name].sample(11, 40)
    assert points.dtype == np.float32 and points.shape == (40, 2)
    np.testing.assert_allclose(points, in_scalars(name, np.random.default_rng(11), 40), atol=1e-5)


def test_mode_coverage_counts_points_and_modes():
    target = TARGETS["8gaussians"]
    near, far = target.centres[0] + [0.23, 0], target.centres[1] + [0.25, 0]
    # Twelve points: a mode needs 12 / 16, so one; the second centre's only point is too far
    points = np.array([near] * 9 + [far] + [[0.0, 0.0]] * 2)
    assert mode_coverage(points, target) == (pytest.approx(9 / 12), 1)
    share, modes = mode_coverage(target.sample(0, 20_000), target)
    assert modes == 8 and share == pytest.approx(1 - math.exp(-9 / 2), abs=0.003)


def test_the_network_is_the_papers():
    networks = Networks(16, 256, 6, [0])
    block = 2 * 256 * 512 + 512 + 256 + 2 * (512 + 256)
    stem, head = 16 * 256 + 256 + 2 * 256, 2 * 256 + 2
    assert sum(p.numel() for p in networks.parameters()) == stem + 6 * block + head
    points = networks(torch.randn(1, 500, 16)).squeeze(0)
    assert points.shape == (500, 2) and 0 < points.std() < 0.1  # 0.001 times a norm of some tens
    # Without its parts, a block is the identity
    (member,) = networks.members
    torch.nn.init.zeros_(member[3].h[4].weight)
    x = torch.randn(4, 256)
    assert torch.equal(member[3](x), x)


def run(params: Path, target: str = "8gaussians", *more: str) -> Path:
    out = params.parent / "artifacts" / f"{target}-l2_sq"
    assert not train.main(
        ["--params", str(params), "--target", target, "--dist-metric", "l2_sq", "--out", str(out), *more]
    )
    return out


def of_seed(out: Path, seed: int) -> list[dict]:
    return [row for row in read_csv(out / "curves.csv") if row["seed"] == seed]


def test_curves_have_a_row_for_each_measurement(params):
    rows = read_csv(run(params) / "curves.csv")
    keys = [(row["coupling"], row["eps"], row["step"], row["seed"]) for row in rows]
    runs = [("real", None), ("row", 0.5), ("sinkhorn", 0.5)]
    assert keys == [(c, eps, step, seed) for c, eps in runs for step in (2, 4, 5) for seed in (5, 6)]
    assert all(row["w2"] > 0 and 0 <= row["near_modes"] <= 1 for row in rows)
    assert {row["modes"] for row in read_csv(run(params, "moons") / "curves.csv")} == {None}


def test_seeds_that_are_trained_together_train_as_each_does_alone(params):
    together = of_seed(run(params), 6)
    params.write_text(TINY.replace("seed: 5\nseeds: 2", "seed: 6\nseeds: 1"))
    alone = of_seed(run(params), 6)
    assert [row["w2"] for row in together] == pytest.approx([row["w2"] for row in alone], rel=1e-4)


def test_the_step_is_adamws(params):
    """With the plain optimiser and autograd's gradient of mean (x - stopgrad(x + V))^2."""
    settings = load_section(params, Toy)
    task = train.ToyTask(settings, "moons", "l2_sq", "sinkhorn", 0.5)
    plain = train.ToyTask(settings, "moons", "l2_sq", "sinkhorn", 0.5)
    member = plain.model.members[1]
    optimizer = torch.optim.AdamW(member.parameters(), lr=0.01)
    for step in range(5):
        noise, points = (part[1] for part in plain.prepare(step))
        x = member(noise)
        goal = (x + velocity(x, points, plain.field)).detach()
        optimizer.zero_grad()
        (x - goal).square().mean().backward()
        optimizer.step()
    ranks = Ranks(0, 1, torch.device("cpu"))
    train.train(task, train.Run(0, train.HARDWARE, ranks, params.parent / "run"))
    for ours, theirs in zip(task.model.members[1].parameters(), member.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_finished_runs_are_not_repeated(params, monkeypatch):
    real, taken = train.train, []

    def stop_at_the_second(task, run):
        taken.append(task.name)
        if len(taken) == 2:
            raise Stopped("stopped", 15)
        return real(task, run)

    monkeypatch.setattr(train, "train", stop_at_the_second)
    with pytest.raises(Stopped):
        run(params)
    first = run(params)
    assert taken == [f"8gaussians l2_sq {c} 0.5" for c in ("row", "sinkhorn", "sinkhorn")]
    curves = (first / "curves.csv").read_text()
    assert (run(params, "8gaussians", "--fresh") / "curves.csv").read_text() == curves
    assert not list(params.parent.glob("work/**/step-*")), "checkpoints of finished runs"


def test_figures_and_tables(params):
    for target in ("8gaussians", "moons"):
        out = run(params, target)
    results = params.parent / "results"
    assert not figures.main(["--params", str(params), "--runs", str(out.parent), "--out", str(results)])
    table = read_csv(results / "table.csv")
    (line,) = [row for row in table if row["coupling"] == "sinkhorn" and row["target"] == "moons"]
    last = [
        row["w2"]
        for row in read_csv(out / "curves.csv")
        if row["coupling"] == "sinkhorn" and row["step"] == 5
    ]
    assert line["runs"] == 2
    assert line["w2_mean"] == pytest.approx(np.mean(last), rel=1e-5)
    assert line["w2_std"] == pytest.approx(np.std(last, ddof=1), rel=1e-4)
    floor = [row["w2"] for row in read_csv(out / "curves.csv") if row["coupling"] == "real"]
    (line,) = [row for row in table if row["coupling"] == "real" and row["target"] == "moons"]
    assert line["w2_mean"] == pytest.approx(np.mean(floor), rel=1e-5) and line["runs"] == 6
    for name in ("w2_l2_sq", "samples_l2_sq"):
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_particles_go_where_a_closed_form_says():
    """Two particles and targets in one place c: each repels the other, so their sum s goes to 2 c.

    V_i = c - x_other, hence s <- s + h (2 c - s)
    """
    p = load_section(ROOT / "experiments/toy/params.yaml", Toy).particles.model_copy(
        update={"step_size": 0.1}
    )
    p = p.model_copy(update={"steps": 10, "count": 2})
    start, c = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32), np.float32([3.0, -1.0])
    path = particles.follow(start, np.stack([c, c]), p, "row", 1.0, [0, 10])
    np.testing.assert_array_equal(path[0], start)
    expected = 2 * c + 0.9**10 * (start.sum(axis=0) - 2 * c)
    np.testing.assert_allclose(path[1].sum(axis=0), expected, rtol=1e-5)


def test_particles_are_animated(params):
    results = params.parent / "results"
    assert not particles.main(["--params", str(params), "--out", str(results)])
    with Image.open(results / "particles.gif") as gif:
        assert gif.n_frames > 2
    rows = read_csv(results / "particles.csv")
    assert [(row["coupling"], row["eps"]) for row in rows] == [
        (c, eps) for c in ("row", "sinkhorn") for eps in (1.0, 0.1)
    ]


def test_every_coupling_of_the_library_has_a_name_and_a_colour():
    assert figures.NAMES.keys() == figures.COLOURS.keys() == {*COUPLINGS, figures.REAL}
    assert len(set(figures.COLOURS.values())) == len(figures.COLOURS)


def test_a_mistake_is_one_line(params):
    params.write_text(TINY.replace("blocks: 1", "block: 1"))
    with pytest.raises(UserError, match=r"network\.block .*did you mean network\.blocks"):
        run(params)


DVC = yaml.safe_load((ROOT / "experiments/toy/dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("name", ["params.yaml", "paper.yaml"])
def test_settings_are_valid_and_have_the_keys_that_dvc_demands(name):
    path = ROOT / "experiments/toy" / name
    load_section(path, Toy)
    listed = {
        key for stage in DVC.values() for entry in stage["params"] for keys in entry.values() for key in keys
    }
    assert (
        listed | {"targets", "dist_metrics"}
        == Toy.model_fields.keys()
        == yaml.safe_load(path.read_text()).keys()
    )
