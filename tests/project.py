"""A copy of the project in a temporary folder, with settings that take seconds, and ways to run it."""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml
from imports import ROOT
from PIL import Image
from safetensors.numpy import load_file

TINY = {
    "data": {"image_size": 16},
    "encode": {"crops": 1},
    "mae": {
        "width": 8, "norm_groups": 4, "batch_size": 32, "steps": 6, "warmup_steps": 2,
        "finetune_steps": 2, "finetune_ramp_steps": 1,
    },
    "drift": {
        "hidden": 16, "depth": 1, "heads": 2, "context_tokens": 1, "style_codebooks": 1,
        "generated": 4, "positives": 4, "unconditional": 2, "steps": 8, "warmup_steps": 2,
    },
    "fid": {"images": 80, "floor_images": 100, "omegas": [1.0, 2.0], "picture_columns": 2},
    "hardware": {"checkpoint_every": 2, "log_every": 1},
}  # fmt: skip
PHOTO_CLASSES = ("beach", "forest", "harbour")
PHOTOS = {
    "data": {"image_size": 32, "classes": len(PHOTO_CLASSES)},
    "encode": {"autoencoder": "pretrained/mnist_vae"},
    "mae": {**TINY["mae"], "layers": [1, 1, 1, 1], "mask_patch": 1, "held_out": 6, "precision": "float32"},
    "drift": {
        **TINY["drift"],
        "precision": "float32",
        "classes_per_step": 3,
        "evaluate_every": 4,
        "evaluate_images": 80,
    },
    "fid": {**TINY["fid"], "features": "pretrained/mnist_classifier", "picture_classes": 3},
    "hardware": {**TINY["hardware"], "compile": False, "workers": 0},
}
"""What makes a preset of images in folders tiny; 40 images a class will do. In bfloat16, gradients of maps as
small as these are not finite on a CPU (docs/log.md)."""


class Project:
    """A checkout of the project that tests may run and change."""

    def __init__(self, folder: Path):
        self.folder = folder
        binaries = str(Path(sys.executable).parent)
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([binaries, os.environ["PATH"]]),
            "PYTHONPATH": str(folder),  # this copy, not the one that is installed
            "OMP_NUM_THREADS": "1",  # the same sums in every run; the networks are too small for more
            "GIT_CONFIG_GLOBAL": os.devnull,
        }
        for who in ("AUTHOR", "COMMITTER"):
            self.environment |= {f"GIT_{who}_NAME": "drift", f"GIT_{who}_EMAIL": "drift@example.org"}

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        where = {"cwd": self.folder, "env": self.environment | environment}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, **where)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *command: str) -> subprocess.Popen:
        quiet = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
        where = {"cwd": self.folder, "env": self.environment}
        return subprocess.Popen(command, start_new_session=True, **quiet, **where)

    def stage(self, name: str, *arguments: str, check: bool = True, **environment: str):
        """Run a stage in a process of its own."""
        return self.run(sys.executable, "-m", f"stages.{name}", *arguments, check=check, **environment)

    def main(self, name: str, *arguments: str) -> None:
        """Run a stage in this process, which must be in the project's folder."""
        assert Path.cwd() == self.folder
        assert importlib.import_module(f"stages.{name}").main(arguments) == 0

    def repro(self, *arguments: str) -> list[str]:
        """Run `dvc repro`, or the `dvc` command given; the stages that ran."""
        done = self.run("dvc", *(arguments or ("repro",)))
        lines = [line for line in done.stdout.splitlines() if line.startswith("Running stage")]
        return [line.split("'")[1] for line in lines]

    def settings(self, file: str = "params.yaml", /, **sections: object) -> None:
        """Change keys of a file of settings, or of its sections."""
        path = self.folder / file
        content = yaml.safe_load(path.read_text())
        for section, values in sections.items():
            if isinstance(values, dict):
                values = {**(content.get(section) or {}), **values}
            content[section] = values
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    def wait_for(self, pattern: str, process: subprocess.Popen) -> None:
        """Until a file or folder that matches is there."""
        end = time.monotonic() + 60
        while not any(self.folder.glob(pattern)):
            assert time.monotonic() < end and process.poll() is None, f"waited in vain for {pattern}"
            time.sleep(0.01)

    def commit(self) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "state")


def copy_project(folder: Path) -> Project:
    project = Project(folder)
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.check_output(listing, cwd=ROOT, text=True).split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    shutil.copyfile(folder / "presets" / "digits.yaml", folder / "params.yaml")
    project.settings(**TINY)
    project.run("git", "init", "--quiet", "--initial-branch", "trunk")
    project.commit()
    return project


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def draw_images(folder: Path, classes: tuple[str, ...], count: int, suffix: str = ".png") -> None:
    """Files of noise in `folder`/<class>, of several sizes."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (*rng.integers(20, 40, 2), 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02}{suffix}")


def weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a model's folder, by file and name."""
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.name}: {name}": array for file in files for name, array in load_file(file).items()}


def relative_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """||w' - w|| / ||w|| over all weights."""
    assert one and one.keys() == other.keys()
    apart = sum(np.square(other[name] - one[name], dtype=np.float64).sum() for name in one)
    return float(np.sqrt(apart / sum(np.square(one[name], dtype=np.float64).sum() for name in one)))


def compare(expected: Path, found: Path, without: tuple[str, ...] = ()) -> str:
    """What differs between two folders of results; empty if nothing does. Times in `logs.jsonl` may."""
    names = [
        {p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name not in without}
        for folder in (expected, found)
    ]
    if others := names[0] ^ names[1]:
        return f"other files: {set(map(str, others))}"
    different = (n for n in sorted(names[0]) if _contents(expected / n) != _contents(found / n))
    return ", ".join(f"{name} differs" for name in different)


def _contents(path: Path) -> bytes | list[dict]:
    if path.name != "logs.jsonl":
        return path.read_bytes()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: v for key, v in line.items() if key not in ("time", "steps_per_s")} for line in lines]
