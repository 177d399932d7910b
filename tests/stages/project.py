"""A copy of the project in a temporary folder, with settings that take seconds, and ways to run it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from imports import ROOT
from ruamel.yaml import YAML

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

    def stage(self, name: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-m", f"stages.{name}", *arguments, check=check)

    def repro(self, *arguments: str) -> list[str]:
        """Run `dvc repro`, or the `dvc` command given; the stages that ran."""
        done = self.run("dvc", *(arguments or ("repro",)))
        lines = [line for line in done.stdout.splitlines() if line.startswith("Running stage")]
        return [line.split("'")[1] for line in lines]

    def settings(self, **sections: dict) -> None:
        """Change keys of params.yaml."""
        path = self.folder / "params.yaml"
        yaml = YAML(typ="safe", pure=True)
        content = yaml.load(path)
        for section, values in sections.items():
            if isinstance(values, dict):
                content[section] |= values
            else:
                content[section] = values
        yaml.dump(content, path)

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
