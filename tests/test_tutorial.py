"""docs/tutorial.md: its commands, keys and numbers; the whole of it on a small folder."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from imports import ROOT
from project import PHOTO_CLASSES, PHOTOS, copy_project, draw_images, free_port

from drift.cli import _parser
from drift.settings import _all_keys, load_settings
from scripts import plan

PAGE = (ROOT / "docs" / "tutorial.md").read_text()
COMMANDS = [
    line for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()
]
VAE = "stabilityai/sd-vae-ft-mse"


def test_the_page_has_commands_of_each_kind():
    assert len(COMMANDS) > 12
    assert {shlex.split(command)[0] for command in COMMANDS} >= {
        "cp",
        "dvc",
        "drift",
        "tensorboard",
        "python",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_there_and_take_their_arguments(command):
    program, *words = shlex.split(command)
    if program == "drift":
        assert _parser().parse_args(words).run
    elif program == "dvc":
        settings = load_settings(ROOT / "presets" / "photos.yaml")
        for change in (words[i + 1] for i, word in enumerate(words) if word in ("-S", "--set-param")):
            key, _, value = change.lstrip("+").partition("=")
            section, _, name = key.rpartition(".")
            holder = getattr(settings, section) if section else settings
            type(settings).model_validate(_changed(settings, section, name, yaml.safe_load(value)))
            in_file = not section or name in holder.model_fields_set
            assert change.startswith("+") != in_file, (
                f"{change}: DVC wants a plus for keys that are not there"
            )
    else:
        assert program in ("cp", "git", "python", "tensorboard")
        assert all(Path(ROOT, word).exists() for word in words if "/" in word)


def _changed(settings, section: str, name: str, value) -> dict:
    content = settings.model_dump(mode="json", exclude_unset=True)
    (content[section] if section else content)[name] = value
    return content


def test_keys_that_the_page_names_exist():
    keys = set(_all_keys())
    named = set(re.findall(r"`((?:data|encode|mae|drift|fid|hardware|field)\.\w+)(?::[^`]*)?`", PAGE))
    assert named and named <= keys
    assert set(re.findall(r"`(\w+): [^`]+`", PAGE)) <= keys


def test_links_of_the_page_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target


def test_values_of_the_preset_that_the_page_tells_are_those_of_the_preset():
    settings = load_settings(ROOT / "presets" / "photos.yaml")
    for key, told in re.findall(r"`(\w+\.\w+)` =\n? ?(\d+)", PAGE):
        section, name = key.split(".")
        assert getattr(getattr(settings, section), name) == int(told), key
    rows = re.findall(r"^\| (`[\w.`, ]+`) \| ([^|]+) \|", PAGE[: PAGE.index("## 3.")], re.M)
    for keys, values in rows:
        told = re.sub(r"[`_]|, the defaults?", "", values).replace(" 000", "000").split(", ")
        keys = re.findall(r"\w+\.\w+", keys)
        for key, value in zip(keys, told * (len(keys) // len(told)), strict=True):
            section, name = key.split(".")
            assert str(getattr(getattr(settings, section), name)).lower() == value, key


def test_the_plan_on_the_page_is_what_the_script_prints():
    assert plan.describe("photos", 1, 100.0, None) in PAGE


def said(project, words: list[str]) -> str:
    return project.run(*words).stdout


def served(project, words: list[str]) -> str:
    """What a server prints until it names its address; it is then ended."""
    where = {"cwd": project.folder, "env": project.environment | {"PYTHONUNBUFFERED": "1"}}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **where)
    try:
        printed = ""
        while "http://" not in printed:
            line = process.stdout.readline()
            assert line, printed
            printed += line
        return printed
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_every_command_of_the_page_on_a_small_folder(tmp_path):
    """In their order, as they stand there, but for the VAE and a port; with smaller sizes in the preset."""
    project = copy_project(tmp_path)
    draw_images(tmp_path / "data" / "photos" / "train", PHOTO_CLASSES, 40)
    project.settings("presets/photos.yaml", **PHOTOS)
    project.commit()
    shown = {}
    for command in COMMANDS:
        words = [word.replace(VAE, "pretrained/mnist_vae") for word in shlex.split(command)]
        words[0] = sys.executable if words[0] == "python" else words[0]
        if command == "drift demo":
            words += ["--port", str(free_port())]
        run = served if words[0] == "tensorboard" or command == "drift demo" else said
        shown[command] = run(project, words)
    for name in ("latents-center/latents", "mae/mae", "features/neighbours", "samples", "best"):
        assert (tmp_path / "outputs" / f"{name}.png").is_file(), name
    for path in ("outputs/photos/README.md", "reports/index.html", "artifacts/generator/best/config.json"):
        assert (tmp_path / path).is_file(), path
    assert "floor:" in shown["drift fid-selftest"] and "drift_rms" in shown["drift watch"]
