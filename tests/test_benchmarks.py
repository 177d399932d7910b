"""Each benchmark runs at a tiny size on a CPU and tells what it should; no speed is asked of the machine."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from imports import ROOT
from ruamel.yaml import YAML
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from drift.field.loss import CHUNK_BYTES, KEEP_BYTES
from drift.models import Generator, LatentMAE
from drift.models.generator import GeneratorConfig
from drift.models.mae import MAEConfig
from drift.params import load_settings

sys.path.append(str(ROOT))  # the benchmarks are not installed

from benchmarks import encode, fid, field, memory, step, timing, training
from benchmarks.memory import LiveBytes
from benchmarks.timing import Split

DIGITS = str(ROOT / "presets" / "digits.yaml")
TINY = ["--preset", DIGITS, "--device", "cpu", "--classes", "2", "--samples", "4", "--width", "8"]
TINY += ["--steps", "2", "--set", "drift.hidden=16", "drift.depth=1", "drift.heads=2", "data.image_size=16"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Products that take no time; and the project's folder, where the presets' paths lead somewhere."""
    monkeypatch.setattr(timing, "MATMUL_SIZES", {"cpu": (64,)})
    monkeypatch.setattr(timing, "MATMUL_SECONDS", 0.001)
    monkeypatch.chdir(ROOT)


def run_step(folder, *arguments: str) -> dict:
    step.main([*arguments, "--json", str(folder / "step.json")])
    return json.loads((folder / "step.json").read_text())


def case(*arguments: str, stage: str = "drift") -> training.Case:
    return training.Case(stage, step.read_settings(step.parse([*TINY, *arguments])), "cpu")


def test_a_step_is_split_into_parts_that_sum_to_the_whole(tmp_path, capsys):
    result = run_step(tmp_path, *TINY)
    parts = result["ms_per_step"]
    assert set(parts) == {
        "data", "generator, forward", "generator, backward", "encoder, real", "encoder, generated, forward",
        "encoder, generated, backward", "field", "optimizer", "EMA", "rest",
    }  # fmt: skip
    assert all(spent > 0 for spent in parts.values())
    assert sum(parts.values()) == pytest.approx(result["step_ms"], rel=0.05)
    assert result["step_ms"] == pytest.approx(1000 / result["steps_per_s"])
    assert result["field_share"] == pytest.approx(parts["field"] / result["step_ms"])
    assert result["flops"]["step"] == sum(result["flops"]["parts"].values())
    matmul = result["matmul"]
    assert matmul["size"] == 64 and matmul["precision"] == "float32"
    share = result["flops"]["step"] * result["steps_per_s"] / matmul["flops_per_s"]
    assert result["share_of_matmul"] == pytest.approx(share)
    assert result["peak_bytes"] > 2**20 and result["encoder_width"] == 8
    assert result["torch"] == torch.__version__ and result["settings"]["drift"]["hidden"] == 16
    printed = capsys.readouterr().out
    assert "whole step" in printed and "steps/s" in printed and "peak memory" in printed


def test_what_is_computed_again_has_parts_of_its_own_and_no_flops(tmp_path):
    saving = ["--classes-per-pass", "1", "--feature-batch", "2", "hardware.activation_checkpointing=true"]
    arguments = [*TINY, saving[-1], *saving[:-1]]  # the last belongs to --set
    result = run_step(tmp_path, *arguments)
    assert result["settings"]["hardware"]["activation_checkpointing"]
    again = {"encoder, for the sums", "encoder, computed again", "generator, without gradient"}
    assert again <= result["ms_per_step"].keys()
    assert not again & result["flops"]["parts"].keys()
    assert result["flops"] == {**result["flops"], "parts": training.step_flops(case())}


@pytest.mark.parametrize("stage", ["drift", "mae"])
def test_compiled_networks_are_split_from_outside(stage, monkeypatch):
    inside = Generator.forward if stage == "drift" else LatentMAE.forward
    seen = []

    def compile(function, name):
        def network(*args, **kwargs):
            seen.append(type(getattr(function, "__self__", function)).forward)
            return function(*args, **kwargs)

        return network

    monkeypatch.setattr(training, "Compiled", compile)
    split = Split(timing.time_meter(torch.device("cpu")))
    split.start()
    tiny = case("hardware.compile=true", "mae.batch_size=2", stage=stage)
    training.run(tiny, 1, lambda done: split.stop(), split)
    network = "generator" if stage == "drift" else "MAE"
    assert {f"{network}, forward", f"{network}, backward"} <= split.totals().keys()
    assert inside in seen


def test_a_plain_step_a_long_run_and_a_trace(tmp_path, capsys):
    trace = tmp_path / "traces" / "trace.json"
    more = ["--plain", "vectorised", "literal", "--minutes", "0.005", "--trace", str(trace)]
    result = run_step(tmp_path, *TINY, *more)
    for plain, name in zip(result["plain"], ("vectorised", "literal"), strict=True):
        assert (plain["field"], plain["classes_per_pass"]) == (name, 2)
        assert plain["ratio"] == pytest.approx(plain["step_ms"] / result["step_ms"])
    long = result["endurance"]
    assert long["steps"] >= 2 and long["seconds"] >= 0.3
    for name in ("steps_per_s", "resident_bytes"):
        assert long["ratio"][name] == pytest.approx(long["last"][name] / long["first"][name])
    costliest = result["trace"]["costliest"]
    assert len(costliest) == step.COSTLIEST
    assert [row["share"] for row in costliest] == sorted((row["share"] for row in costliest), reverse=True)
    assert len(json.loads(trace.read_text())["traceEvents"]) > 100
    assert "x as fast" in capsys.readouterr().out


def test_the_plain_field_stands_only_for_the_settings_that_it_knows(capsys):
    with pytest.raises(SystemExit, match="coupling is row"):
        step.main([*TINY, "coupling=row", "--plain"])
    field_settings = load_settings(DIGITS).field()
    assert training.no_plain_field(field_settings) is None
    assert "temps" in training.no_plain_field(dataclasses.replace(field_settings, temps=(0.1,)))


def test_the_plain_step_takes_fewer_classes_at_once_where_there_is_no_room(monkeypatch):
    tried = []

    def measure(case, steps, **_):
        tried.append(case.settings.hardware.classes_per_pass)
        if tried[-1] > 2:
            raise torch.OutOfMemoryError
        return {"step_ms": 1.0}

    monkeypatch.setattr(step, "measure", measure)
    plain = step.measure_plain(case("drift.classes_per_step=8"), "literal")
    assert tried == [8, 4, 2] and plain["classes_per_pass"] == 2


def test_a_table_has_a_row_for_each_number_of_classes_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "in_child", lambda call, *arguments: call(*arguments))
    result = run_step(tmp_path, *TINY, "--classes-per-pass", "2", "1")
    assert [row["classes_per_pass"] for row in result["memory_table"]] == [2, 1]
    assert all(
        row["fits"] and row["peak_bytes"] > 2**20 and row["step_ms"] > 0 for row in result["memory_table"]
    )
    assert "classes at once" in capsys.readouterr().out

    def no_room(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step, "measure", no_room)
    result = run_step(tmp_path, *TINY, "--classes-per-pass", "2", "1")
    assert [row["fits"] for row in result["memory_table"]] == [False, False]


def test_live_bytes_are_those_of_storages():
    with LiveBytes() as bytes_:
        a = torch.zeros(1000)
        view = a.view(10, 100)[2:]
        b = a + 1
        assert bytes_.live == bytes_.peak == 8000
        del a, b
        assert bytes_.live == 4000  # the view's
        del view
        assert bytes_.live == 0 and bytes_.peak == 8000


MEDIUM = ["mae.layers=[2,2,2,2]", "drift.hidden=64", "drift.depth=3", "drift.heads=4"]
SAVING = ["hardware.activation_checkpointing=true", "hardware.feature_batch=48"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read as Linux tells it")
@pytest.mark.parametrize("changes", [MEDIUM, MEDIUM + SAVING], ids=["all-kept", "saving"])
def test_estimated_memory_is_that_of_a_step_that_runs(changes, monkeypatch):
    """Further samples cost what the estimate says; what a process has from the start cancels out."""
    for bounds in (CHUNK_BYTES, KEEP_BYTES):  # of the field on the CPU that is measured
        monkeypatch.setitem(bounds, "cuda", bounds["cpu"])
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed leaves the process at once
    measured, estimated = [], []
    for samples in ("32", "128"):
        arguments = ["--preset", DIGITS, "--device", "cpu", "--classes", "4", "--samples", samples]
        args = step.parse([*arguments, "--width", "32", "--set", *changes])
        medium = training.Case("drift", step.read_settings(args), "cpu")
        measured.append(timing.in_child(step.table_row, medium, None)["peak_bytes"])
        estimated.append(memory.estimate(medium.settings)["total"])
    more = measured[1] - measured[0]
    assert more > 50 * 2**20
    assert estimated[1] - estimated[0] == pytest.approx(more, rel=0.15)


def test_an_estimate_needs_no_device(tmp_path, capsys):
    arguments = [*TINY, "drift.precision=bfloat16", "--classes-per-pass", "2", "1", "--estimate"]
    result = run_step(tmp_path, *arguments)
    assert result["settings"]["drift"]["precision"] == "bfloat16"
    two, one = (row["estimated_bytes"] for row in result["memory_estimate"])
    assert two["a part of the step"] > one["a part of the step"] > 0
    assert "estimated, not measured" in capsys.readouterr().out
    # Float32: weights, two moments, an EMA; the encoder alone
    generator = Generator(GeneratorConfig(input_size=4, num_classes=10, hidden_size=16, depth=1, num_heads=2,
        patch_size=2, context_tokens=1, style_codebooks=case().settings.drift.style_codebooks,
        style_entries=case().settings.drift.style_entries))  # fmt: skip
    copies = 3 + len(case().settings.drift.ema_decays)
    assert two["weights, moments, EMA"] == 4 * copies * sum(p.numel() for p in generator.parameters())


def test_a_child_has_memory_of_its_own():
    assert timing.in_child(math.gcd, 4, 6) == 2


def test_the_mae_stage_is_split_too(tmp_path):
    tiny = ["--preset", DIGITS, "--device", "cpu", "--stage", "mae", "--batch", "4", "--width", "8"]
    result = run_step(tmp_path, *tiny, "--steps", "2", "--set", "hardware.mae_micro_batch=2")
    parts = result["ms_per_step"]
    assert set(parts) == {"data", "MAE, forward", "MAE, backward", "optimizer", "EMA", "rest"}
    assert sum(parts.values()) == pytest.approx(result["step_ms"], rel=0.05)
    counts = result["flops"]["parts"]
    model = LatentMAE(MAEConfig(base_channels=8, layers=(1, 1, 1, 1), norm_groups=8, num_classes=10))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 4, dtype=torch.bool))
    assert counts["MAE, forward"] == 4 * counter.get_total_flops() // 3
    # Twice the forward pass, without the gradient of the input
    stem = 2 * 4 * 8 * 9 * 64
    assert counts["MAE, backward"] == 2 * counts["MAE, forward"] - 4 * stem


def test_a_generator_has_the_flops_of_its_linear_layers_and_attention():
    counts = training.step_flops(case())
    n, d, t = 2 * 4, 16, 4 + 1  # samples, hidden size, tokens with the one of the context
    h, patch = 64, 4 * 2**2
    assert h == GeneratorConfig(hidden_size=d, num_heads=2).mlp_hidden_size
    conditioning = 256 * d + d * d + d * d + d * 6 * d + d * 2 * d  # omega (2), context, block, final
    tokens = t * (3 * d * d + d * d + 3 * d * h) + 2 * t * t * d + 4 * (patch * d + d * patch)
    forward = 2 * n * (conditioning + tokens)
    assert counts["generator, forward"] == forward
    # No gradient for what no parameter lies behind: the noise's patches, and the sinusoids of omega
    assert counts["generator, backward"] == 2 * forward - 2 * n * (4 * patch * d + 256 * d)


def test_a_frozen_encoder_has_half_a_backward_pass():
    counts = training.step_flops(case("drift.generated=3", "drift.positives=2", "drift.unconditional=1"))
    model = LatentMAE(MAEConfig(base_channels=8, layers=(1, 1, 1, 1), norm_groups=8, num_classes=2))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode(torch.zeros(1, 4, 4, 4))
    one = counter.get_total_flops()
    assert counts["encoder, real"] == 2 * 3 * one
    assert counts["encoder, generated, forward"] == counts["encoder, generated, backward"] == 2 * 3 * one


@pytest.mark.parametrize("changes", [("negatives=second_batch", "drift.duplicate_features=keep"), ()])
def test_counts_are_those_of_the_steps_that_run(changes):
    """The counter around the training loop, where couplings may hold products with vectors."""
    tiny = case(*changes)
    totals = []
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        training.run(tiny, 2, lambda done: totals.append(counter.get_total_flops()))
    assert totals[1] == pytest.approx(2 * totals[0], rel=0.01)
    assert sum(training.step_flops(tiny).values()) == pytest.approx(totals[0], rel=0.01)


def test_a_split_counts_nothing_twice():
    now = 0
    split = Split((lambda: now, lambda start, end: end - start))
    split.start()
    now += 1
    with split.part("outer"):
        now += 10
        with split.part("inner"):
            now += 100
            assert split.at_work("outer")
        split.cut("later")
        now += 1000
    now += 1
    split.stop()
    now += 5
    assert split.totals() == {"rest": 2, "outer": 10, "inner": 100, "later": 1000}


def test_encoding_is_compared_with_the_network_alone(tmp_path, capsys):
    small = ["--device", "cpu", "--count", "4", "--image-size", "32", "--batch", "2", "--workers", "0"]
    small += ["--vae-precision", "bfloat16"]
    encode.main([*small, "--json", str(tmp_path / "encode.json")])
    result = json.loads((tmp_path / "encode.json").read_text())
    (row,) = result["rows"]
    assert result["images"] == 4 and result["vae_images_per_s"] > 0
    assert result["vae_precision"] == "bfloat16"
    assert row["of_vae"] == pytest.approx(row["both"] / result["vae_images_per_s"])
    assert row["share"] == pytest.approx(row["both"] / min(row["decode"], result["vae_images_per_s"]))
    assert "of VAE" in capsys.readouterr().out


def test_fid_is_compared_with_its_networks_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fid, "in_child", lambda call, *arguments: call(*arguments))
    config = GeneratorConfig(
        input_size=8, num_classes=10, hidden_size=16, depth=1, num_heads=2, context_tokens=1,
        style_codebooks=1, style_entries=2,
    )  # fmt: skip
    Generator(config).save_pretrained(tmp_path / "generator")
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load(ROOT / "presets" / "digits.yaml")
    content["fid"] |= {"floor_images": 80, "metrics": [], "picture_classes": 1, "picture_columns": 1}
    content["hardware"]["sample_batch"] = 32
    yaml.dump(content, tmp_path / "params.yaml")
    arguments = ["--images", "80", "--params", str(tmp_path / "params.yaml"), "--batches", "1"]
    arguments += ["--generator", str(tmp_path / "generator"), "--json", str(tmp_path / "fid.json")]
    fid.main([*arguments, "--vae-precision", "bfloat16"])
    result = json.loads((tmp_path / "fid.json").read_text())
    (row,) = result["rows"]
    rates = result["networks_images_per_s"]
    assert 1 / rates["all"] == pytest.approx(sum(1 / rates[n] for n in ("generator", "VAE", "features")))
    assert row["of_networks"] == pytest.approx(row["images_per_s"] / rates["all"])
    assert result["vae_precision"] == "bfloat16"
    assert row["images"] == 80 and row["peak_mib"] > 50
    assert "of the networks" in capsys.readouterr().out


def test_fields_are_compared_with_plain_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(field, "SHAPES", ((4, 8), (1, 16)))
    monkeypatch.setattr(field, "extra_bytes", lambda *_: 2**20)  # else a process for each
    arguments = ["--device", "cpu", "--classes", "1", "--repeats", "1"]
    arguments += ["--json", str(tmp_path / "field.json")]
    monkeypatch.setattr("sys.argv", ["field", *arguments])
    field.main()
    result = json.loads((tmp_path / "field.json").read_text())
    assert [(row["locations"], row["channels"]) for row in result["rows"]] == [(4, 8), (1, 16)]
    for row in result["rows"]:
        assert row["speedup"]["literal"] == pytest.approx(row["seconds"]["literal"] / row["seconds"]["ours"])
    assert {"vectorised", "literal"} <= result["geometric_mean_speedup"].keys()
