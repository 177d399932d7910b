"""A copy of the project in a temporary folder, with settings that take seconds, and ways to run it."""

import importlib
import json
import os
import shutil
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
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *command: str) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

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

    def settings(self, **sections: object) -> None:
        """Change keys of params.yaml, or of its sections."""
        path = self.folder / "params.yaml"
        content = yaml.safe_load(path.read_text())
        for section, values in sections.items():
            merged = {**(content.get(section) or {}), **values} if isinstance(values, dict) else values
            content[section] = merged
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
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listing.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    shutil.copyfile(folder / "presets" / "digits.yaml", folder / "params.yaml")
    project.settings(**TINY)
    project.run("git", "init", "--quiet", "--initial-branch", "trunk")
    project.commit()
    return project


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


TIMES = ("time", "steps_per_s")


def compare(expected: Path, found: Path, log_tolerance: float = 0.0, without: tuple[str, ...] = ()) -> str:
    """What differs between two folders of results; empty if nothing does. Times in `logs.jsonl` may.

    With a tolerance, statistics in `logs.jsonl` and in plots, which are made of it, may differ by so much.
    """
    names = [
        sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file() and p.name not in without)
        for f in (expected, found)
    ]
    if names[0] != names[1]:
        return f"other files: {set(map(str, names[0])) ^ set(map(str, names[1]))}"
    return ", ".join(
        f"{name} differs"
        for name in names[0]
        if not _equal(_contents(expected / name), _contents(found / name), log_tolerance)
    )


def _equal(one: object, other: object, tolerance: float) -> bool:
    if isinstance(one, bytes):
        return one == other
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k], tolerance) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_equal, one, other, [tolerance] * len(one)))
    return one == other or (isinstance(one, float) and abs(one - other) <= tolerance * abs(one))


def _contents(path: Path) -> object:
    if path.suffix == ".csv":
        return [[float(x) for x in row.split(",")] for row in path.read_text().splitlines()[1:]]
    if path.name != "logs.jsonl":
        return path.read_bytes()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
