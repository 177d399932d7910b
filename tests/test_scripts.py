"""scripts/: the plan counted again, and ImageNet on a machine of stubs."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from imports import ROOT
from project import PHOTO_CLASSES, PHOTOS, copy_project, draw_images
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from drift.autoencoders import AUTOENCODERS
from drift.models import Generator, LatentMAE
from drift.runtime.torchvision import ensure_torchvision
from drift.settings import load_settings
from drift.training.drift import generator_config
from drift.training.mae import mae_config
from scripts import plan

SD_VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "latent_channels": 4, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
LATENTS = {"kl": (4, 8), "rae": (768, 16), "pixels": (3, 1)}
PRESETS = {path.stem: load_settings(path) for path in (ROOT / "presets").glob("*.yaml")}
IMAGENET = sorted(name for name, s in PRESETS.items() if s.data.root == "data/imagenet")
EXA, GB = 1e18, 1e9


def flops(forward) -> float:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        forward()
    return counter.get_total_flops()


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def counted(name: str, images: int, gpus: int) -> dict[str, float]:
    """What `plan.Plan` says of a preset, from one forward pass of each network without numbers."""
    settings = PRESETS[name]
    channels, reduction = LATENTS[settings.encode.autoencoder.kind]
    side, drift, hardware = settings.data.image_size // reduction, settings.drift, settings.hardware
    store = SimpleNamespace(shape=(images, channels, side, side), num_classes=settings.data.classes)
    found = {}
    with FakeTensorMode():
        generator = Generator(**generator_config(drift, store))
        style = torch.zeros(1, drift.style_codebooks, dtype=torch.int64)
        one = torch.zeros(1, dtype=torch.int64), torch.ones(1), style
        generate = flops(lambda: generator(torch.empty(1, *store.shape[1:]), *one))
    found["generator_checkpoint"] = parameters(generator) * 4 * (3 + len(drift.ema_decays)) / GB
    encode = found["mae"] = found["mae_checkpoint"] = 0.0
    if settings.needs_mae:
        latent = torch.empty(1, *store.shape[1:], device="meta")
        with torch.device("meta"):
            mae = LatentMAE(**mae_config(settings.mae, store))
            mask = torch.zeros(1, *mae.mask_grid(side, side), dtype=torch.bool)
        encode = flops(lambda: mae.encode(latent))
        found["mae"] = (
            3 * flops(lambda: mae(latent, mask)) * settings.mae.batch_size * settings.mae.steps / EXA
        )
        found["mae_checkpoint"] = parameters(mae) * 4 * 4 / GB

    if any(one.encoder == "convnext" for one in settings.features):
        encode += convnext()
    n, real = drift.generated, drift.positives + drift.unconditional
    second = n if settings.negatives == "second_batch" else 0
    through_generator, through_encoder = 3 * n + second, 2 * n + real + second
    per_step = drift.classes_per_step * drift.steps / EXA
    found["drift"] = per_step * (generate * through_generator + encode * through_encoder)
    mine = drift.classes_per_step // gpus
    at_once = min(hardware.classes_per_pass or mine, mine)
    if at_once < mine and settings.field_settings().normalization_scope == "batch":  # for S, for lambda
        through_generator += n + second
        through_encoder += 2 * (n + real + second)
    through_generator += n * hardware.activation_checkpointing
    through_encoder += n * (at_once * n > (hardware.feature_batch or math.inf))
    found["drift_as_set"] = per_step * (generate * through_generator + encode * through_encoder)

    crops = settings.encode.crops if "augmented" in settings.views else 0
    rows = images * (crops + (1 + settings.encode.mirror) * ("center" in settings.views))
    size = AUTOENCODERS[settings.encode.autoencoder.kind].storage_dtype.itemsize
    found["latents"] = rows * math.prod(store.shape[1:]) * size / GB
    if settings.encode.autoencoder.kind != "rae":
        with_vae = settings.encode.autoencoder.kind == "kl"
        images_in, latents_in = sd_vae(settings.data.image_size) if with_vae else (0, 0)
        found["encode"] = rows * images_in / EXA
        measured = settings.fid.images * len(settings.fid.omegas) * len(settings.fid.ema_decays)
        found["fid"] = measured * (latents_in + generate) / EXA
    return found


@cache
def sd_vae(size: int) -> tuple[float, float]:
    """FLOPs of the encoder and of the decoder for an image."""
    ensure_torchvision()
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**SD_VAE)
        image, latent = torch.empty(1, 3, size, size), torch.empty(1, 4, size // 8, size // 8)
        return flops(lambda: vae.encoder(image)), flops(lambda: vae.decoder(latent))


@cache
def convnext() -> float:
    """FLOPs of facebook/convnextv2-base-22k-224 for an image, which has no decoder in front of it here."""
    ensure_torchvision()
    from transformers import ConvNextV2Config, ConvNextV2Model

    with torch.device("meta"):
        model = ConvNextV2Model(ConvNextV2Config(depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024]))
        image = torch.empty(1, 3, 224, 224)
    return flops(lambda: model(image))


@pytest.mark.parametrize("name", plan.PLANS)
def test_plans_are_what_networks_and_settings_count_to(name):
    of_plan = plan.PLANS[name]._asdict()
    for what, number in counted(name, of_plan["images"], of_plan["gpus"]).items():
        assert of_plan[what] == pytest.approx(number, rel=0.03), what


def test_every_preset_of_imagenet_has_a_plan_and_a_first_line_of_its_own():
    """By which scripts/imagenet.sh knows that params.yaml is of it."""
    assert set(IMAGENET) == {name for name, of in plan.PLANS.items() if of.images == plan.IMAGENET}
    assert len({(ROOT / "presets" / f"{name}.yaml").open().readline() for name in IMAGENET}) == len(IMAGENET)


def test_the_page_on_imagenet_has_the_table():
    assert plan.table() in (ROOT / "docs" / "imagenet.md").read_text()


def test_hours_and_cost_are_work_over_rate(capsys):
    """3.6 EFLOP at 100 TFLOP/s are 10 hours of a GPU."""
    work = plan.Plan(0.3, 1.2, 2.0, 5.6, 0.1, 1, 1, 1, 1, 80, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.PLANS, "one", work)
        patch.setattr(sys, "argv", ["plan.py", "one", "--gpus", "2", "--tflops", "100", "--price", "3"])
        assert plan.main() == 0
    shown = capsys.readouterr().out
    assert "10 to 20 GPU hours at 100 TFLOP/s" in shown and "5 to 10 hours on 2 GPUs" in shown
    assert "cost       30 to 60" in shown


class Machine:
    """A folder with the project's presets and scripts, and programs that say what they are called with."""

    def __init__(self, folder: Path, gpus: str = "81559\n" * 8):
        self.folder, self.calls, programs = folder, folder / "calls", folder / "programs"
        for name in ("scripts", "presets"):
            shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
        shutil.copyfile(ROOT / "params.yaml", folder / "params.yaml")
        (folder / "storage").touch()  # DVC's default remote: none
        for split in ("train", "val"):
            (folder / "images" / split / "n01440764").mkdir(parents=True)
            (folder / "images" / split / "n01440764" / "one.JPEG").touch()
        say = f'#!/bin/bash\necho "$(basename "$0") $*" >> {self.calls}\n'
        stop = "trap 'echo saved >> calls; exit 130' INT\ntouch started\nwhile :; do sleep 0.05; done\n"
        dvc = f'{say}case "$*" in "config core.remote") exec cat storage;; pull*) exit 1;; esac\n'
        dvc += f'if [ -e wait ] && [ "$1" = repro ]; then {stop}fi\n[ ! -e broken ]\n'
        for name, text in {
            "programs/nvidia-smi": f"#!/bin/bash\nprintf '{gpus}'\n" if gpus else "#!/bin/bash\nexit 9\n",
            "programs/df": "#!/bin/bash\necho Avail; echo 9000\n",
            "programs/make": say,
            ".venv/bin/python": say,
            ".venv/bin/drift": say,
            ".venv/bin/dvc": dvc,
        }.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}

    def start(self, *arguments: str) -> subprocess.Popen:
        command = ["bash", "scripts/imagenet.sh", *arguments]
        out = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | {"stdin": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, text=True, **out)

    def run(self, *arguments: str) -> SimpleNamespace:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=600)
        return SimpleNamespace(code=process.returncode, out=out, err=err)

    @property
    def called(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.mark.parametrize("name", IMAGENET)
def test_dry_run_shows_plan_and_commands_and_runs_none(tmp_path, name):
    machine = Machine(tmp_path)
    done = machine.run("--dry-run", "--preset", name, "--images", "images", "--push", "me/mine")
    assert (done.code, done.err, machine.called) == (0, "", ["dvc config core.remote"])
    assert "problem" not in done.out and not (tmp_path / "data").exists()
    assert f"{name}: planned for" in done.out and "hours on 8 GPUs" in done.out
    commands = [line for line in done.out.splitlines() if line.startswith("+ ")]
    assert commands[0].startswith("+ make setup git PYTHON=") and "+ dvc repro" in commands
    assert commands[-1].endswith("--push me/mine") and f"outputs/{name}" in commands[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "imagenet64"], "error: preset imagenet64: there is no plan for it"),
        (["--preset", "photos"], "error: --preset photos: is not one of ImageNet"),
        (["--images", "elsewhere"], "error: no images in elsewhere/train/<class>/: image-net.org"),
        (["--images", "images"], "error: nobody can be asked here: give --yes"),
        (["--speed", "9"], "error: --speed: there is no such option"),
        (["--price"], "error: --price needs a value"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(tmp_path, arguments, said):
    machine = Machine(tmp_path)
    done = machine.run(*arguments)
    assert (done.code, machine.called) == (2, [])
    assert done.err.startswith(said) and done.err.count("\n") == 1


def test_without_a_gpu_it_ends_and_a_dry_run_says_so(tmp_path):
    machine = Machine(tmp_path, gpus="")
    done = machine.run("--images", "images", "--yes")
    assert (done.code, machine.called) == (2, []) and done.err.startswith("error: no NVIDIA GPU: ")
    done = machine.run("--images", "images", "--dry-run")
    assert done.code == 0 and "problem    no NVIDIA GPU" in done.out and "hours on 1 GPU\n" in done.out


def test_small_gpus_are_warned_of(tmp_path):
    done = Machine(tmp_path, gpus="24564\n").run("--images", "images", "--dry-run")
    assert "warning    a GPU has 24564 MiB, not 80 GB: lower hardware.classes_per_pass" in done.out


def test_it_goes_on_after_a_failure_and_keeps_changed_settings(tmp_path):
    machine, arguments = Machine(tmp_path), ("--images", "images", "--yes")
    (tmp_path / "broken").touch()
    done = machine.run(*arguments)
    assert done.code == 1 and "error: exit code 1 of: dvc" in done.out
    params, preset = tmp_path / "params.yaml", tmp_path / "presets" / "imagenet256_ablation.yaml"
    assert params.read_text() == preset.read_text()
    assert (tmp_path / "params.yaml.~1~").read_text() == (ROOT / "params.yaml").read_text()
    params.write_text(params.read_text().replace("classes_per_pass: 32", "classes_per_pass: 16"))
    (tmp_path / "broken").unlink()
    done = machine.run(*arguments)
    assert done.code == 0 and "classes_per_pass: 16" in params.read_text()
    assert [call.split(" ")[0] for call in machine.called[-4:]] == ["python", "drift", "dvc", "python"]
    assert machine.called[-2] == "dvc repro" and machine.called[-3] == "drift fid-selftest"
    assert (tmp_path / "data" / "imagenet" / "val").is_dir()
    assert (tmp_path / "imagenet.log").read_text().count("+ make setup git") == 2


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_signals_reach_the_stage_as_an_interrupt(tmp_path, number, code):
    machine = Machine(tmp_path)
    (tmp_path / "wait").touch()
    process = machine.start("--images", "images", "--yes")
    end = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and machine.called[-1] == "saved"
    assert out.endswith("stopped: the same command goes on\n")


@pytest.mark.slow
def test_a_tiny_imagenet_from_images_to_metrics_with_a_stop_in_between(tmp_path):
    """With DVC and the stages themselves; GPUs, disk and installation are made up."""
    project = copy_project(tmp_path)
    machine = Machine(tmp_path)
    shutil.rmtree(tmp_path / "images")
    for split in ("train", "val"):
        draw_images(tmp_path / "images" / split, PHOTO_CLASSES, 40)
    shutil.rmtree(tmp_path / ".venv")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    preset = tmp_path / "presets" / "imagenet256_ablation.yaml"
    name, first = str(preset.relative_to(tmp_path)), preset.open().readline()  # by which the script knows it
    project.settings(name, **PHOTOS)
    project.settings(name, drift={"steps": 150, "evaluate_every": 0})
    preset.write_text(first + preset.read_text())
    machine.environment |= {key: project.environment[key] for key in ("PYTHONPATH", "OMP_NUM_THREADS")}
    process = machine.start("--images", "images", "--yes")
    for begun in (".work/encode/*", ".work/mae/*/step-*", ".work/drift/*/step-*"):
        project.wait_for(begun, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 143 and "drift: SIGINT after step" in out, out
    assert not (tmp_path / "artifacts" / "generator").exists()
    done = machine.run("--images", "images", "--yes")
    assert done.code == 0, done.out
    assert "Stage 'mae' didn't change, skipping" in done.out
    assert json.loads((tmp_path / "metrics" / "fid.json").read_text())["fid"] > 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="pip install -e '.[dev]' brings it")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", *map(str, (ROOT / "scripts").glob("*.sh"))], check=True)
