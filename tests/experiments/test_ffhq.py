"""The FFHQ experiment on a stand-in: its field, its step, its latents, and a tiny run to the table."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from complaints import complaint
from scipy.optimize import linear_sum_assignment

from drift.runtime.processes import Ranks
from drift.settings import Hardware
from drift.training.loop import Run
from experiments.common import load_section
from experiments.ffhq import evaluate, latents, train
from experiments.ffhq.generator import LatentGenerator
from experiments.ffhq.latents import CLASSES, read_latents
from experiments.ffhq.settings import Settings, Train

PARAMS = """
seed: 3
seeds: 2
couplings: [partial_two_sided, sinkhorn]
temps: [10.0]
data: {train: train.npz, test: test.npz}
stand_in: {dimensions: 12, train: 30, test: 20}
train: {hidden: 16, layers: 1, generated: 8, steps: 6, evaluate_every: 3}
evaluation: {samples: 20}
hardware: {prefetch: 0}
"""


def rows_of(kernel, sinkhorn):
    """A plan's rows, each with sum 1, in the plainest words."""
    if sinkhorn:
        u, v = np.ones(len(kernel)), np.ones(kernel.shape[1])
        for _ in range(30):
            u = 1 / len(u) / (kernel @ v)
            v = 1 / len(v) / (kernel.T @ u)
        plan = u[:, None] * kernel * v
    else:
        plan = kernel / np.sqrt(kernel.sum(1, keepdims=True) * kernel.sum(0))
    return plan / plan.sum(1, keepdims=True)


@pytest.mark.parametrize("coupling", ["partial_two_sided", "sinkhorn"])
def test_loss_and_gradient_of_a_class(coupling, tmp_path):
    """The sum of V^2 over the number of samples; V = P(x, y) y - P(x, x) x with the diagonal left in."""
    rng = np.random.default_rng(0)
    pools = [torch.from_numpy(rng.normal(size=(n, 5))).float() for n in (9, 4, 7, 5, 6, 8)]
    field = train.field_settings(coupling, 2.0, 5, 30)
    options = Train(steps=1, hidden=16, layers=1, generated=6)
    run = Run(0, Hardware(), Ranks(0, 1, torch.device("cpu")), tmp_path)
    task, made = train.FfhqTraining(pools, pools, field, options, run), []

    def network(*inputs):
        made.append(task.model(*inputs).detach().requires_grad_())
        return made[0]

    loss, _ = task.loss(network, task.prepare(4), slice(2, 3), None)
    loss.backward()
    x, y = (part.detach().double().numpy() for part in (made[0], pools[2]))

    def kernel(a, b):
        return np.exp(-np.square(a[:, None] - b[None]).sum(2) / 2.0)

    sinkhorn = coupling == "sinkhorn"
    v = rows_of(kernel(x, y), sinkhorn) @ y - rows_of(kernel(x, x), sinkhorn) @ x
    assert float(loss.detach()) == pytest.approx(np.square(v).sum() / 6, rel=1e-4)
    assert np.abs(made[0].grad.numpy() + 2 * v / 6).max() < 1e-4 * np.abs(v).max()


def test_the_embedding_has_its_own_learning_rate():
    """One step of Adam moves each weight by the learning rate; what enters the MLP moves by the other one."""
    model = LatentGenerator(4, 8, 1, embedding_scale=1e-3 / 3e-4)

    def embedded():
        return (model.config.embedding_scale * model.class_emb.weight).detach().clone()

    assert embedded().std() == pytest.approx(0.01, rel=0.2)
    before = embedded(), model.mlp[0].weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    model(torch.randn(6, 4), torch.arange(6)).square().sum().backward()
    optimizer.step()
    moved = (embedded() - before[0]).abs(), (model.mlp[0].weight.detach() - before[1]).abs()
    assert moved[0].median() == pytest.approx(1e-3, rel=1e-2)
    assert moved[1].median() == pytest.approx(3e-4, rel=1e-2)


def save(path: Path, **changes) -> Path:
    arrays = latents.stand_in(12, 30, 0, "train") | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_latents_are_read_by_class(tmp_path):
    other = latents.stand_in(12, 7, 0, "test")
    found = read_latents(
        save(tmp_path / "a.npz", male_old=other["male_old"].astype(np.float64)), "data.train"
    )
    assert [tuple(x.shape) for x in found] == [(30, 12), (30, 12), (7, 12), *[(30, 12)] * 3]
    assert found[2].dtype == torch.float32 and (found[2].numpy() == other["male_old"]).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"female_old": None}, "female_old"),
        ({"male_old": np.zeros((3, 11))}, "male_old is (3, 11)"),
        ({"male_old": np.zeros((0, 12))}, "male_old is (0, 12)"),
    ],
)
def test_a_mistake_in_the_latents_is_one_line(tmp_path, changes, said):
    path = save(tmp_path / "a.npz", **changes)
    line = complaint(lambda: read_latents(path, "data.train"))
    assert f"data.train = {path}" in line and said in line


def test_files_that_are_none(tmp_path):
    assert "there is no such file" in complaint(lambda: read_latents(tmp_path / "a.npz", "data.test"))
    (tmp_path / "b.npz").write_bytes(b"latents")
    assert "cannot be read" in complaint(lambda: read_latents(tmp_path / "b.npz", "data.test"))


def test_the_stand_in_has_six_classes_that_differ():
    train_latents, test_latents = (latents.stand_in(64, 50, 0, split) for split in ("train", "test"))
    assert tuple(train_latents) == CLASSES
    same = np.square(train_latents["male_old"][:, None] - test_latents["male_old"]).sum(2).min(1).mean()
    other = np.square(train_latents["male_old"][:, None] - test_latents["male_adult"]).sum(2).min(1).mean()
    assert 0 < same < other / 2


class Eyes:
    """A feature network: the mean colour of an image."""

    dimension = 3

    def __call__(self, images):
        assert images.dtype == torch.uint8 and images.shape[1:] == (4, 4, 3)
        return images.float().mean((1, 2))


def test_the_judge_measures_transport_and_fid():
    """Of a shift by (3, 0, 4): its square; of the decoded one-coloured images, in bytes, too."""
    rng = np.random.default_rng(0)
    real = [torch.from_numpy(rng.integers(60, 180, size=(40, 3))).float() for _ in CLASSES]

    def decoder(x):
        return (((x + 0.5) / 255) * 2 - 1)[:, :, None, None].expand(-1, 3, 4, 4)

    judge = evaluate.Judge(real, decoder, Eyes())
    shifted = [x + torch.tensor([3.0, 0, 4]) for x in real]
    assert judge.measure(shifted) == pytest.approx({"emd": 25, "fid": 25}, rel=1e-4)
    mixed = [torch.from_numpy(rng.normal(size=(40, 3))).float() for _ in CLASSES]
    costs = [np.square(x[:, None].numpy() - y.numpy()).sum(2) for x, y in zip(mixed, real, strict=True)]
    expected = np.mean([cost[linear_sum_assignment(cost)].mean() for cost in costs])
    assert evaluate.Judge(real).measure(mixed) == pytest.approx({"emd": expected}, rel=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which all stages have run."""
    folder = tmp_path_factory.mktemp("ffhq")
    (folder / "params.yaml").write_text(PARAMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module, out in ((latents, "."), (train, "generators"), (evaluate, "results")):
            more = ["--generators", "generators"] if module is evaluate else []
            patch.setattr("sys.argv", ["x", "--params", "params.yaml", "--out", out, *more])
            module.main()
    return folder


def test_from_latents_to_table(finished):
    with (finished / "results" / "runs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {(line["coupling"], line["eps"], line["seed"]) for line in lines} == {
        (coupling, "10", seed) for coupling in ("partial_two_sided", "sinkhorn") for seed in "34"
    }
    with (finished / "results" / "table.csv").open() as file:
        table = {row["coupling"]: float(row["emd_mean"]) for row in csv.DictReader(file)}
    mine = [float(line["emd"]) for line in lines if line["coupling"] == "sinkhorn"]
    assert table["sinkhorn"] == pytest.approx(np.mean(mine), rel=1e-4)
    metrics = json.loads((finished / "results" / "metrics.json").read_text())
    assert 0 < metrics["floor"]["emd"] < min(table.values()) and "fid" not in metrics["floor"]
    log = finished / "generators" / "sinkhorn-eps10-seed3" / "logs.jsonl"
    watched = [line["emd"] for line in map(json.loads, log.read_text().splitlines()) if "emd" in line]
    assert len(watched) == 2 and all(math.isfinite(value) for value in watched)
    assert (finished / "results" / "samples.png").stat().st_size > 5000


def test_a_decoder_that_is_none_is_one_line(finished, monkeypatch):
    monkeypatch.chdir(finished)
    (finished / "decoder.pt").write_bytes(b"decoder")
    settings = load_section("params.yaml", Settings)
    options = settings.evaluation.model_copy(update={"decoder": "decoder.pt"})
    changed = settings.model_copy(update={"evaluation": options})
    assert "evaluation.decoder = decoder.pt" in complaint(lambda: evaluate.Judge.of(changed))
