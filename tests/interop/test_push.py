"""drift export --push, against a stub of the hub on this machine."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hub_stub import TOKEN, Repository, running
from huggingface_hub import ModelCard
from huggingface_hub.utils import _http
from imports import ROOT
from small_generator import write_generator
from test_card import metrics_of

from drift import cli
from drift.interop import DriftPipeline

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's


def export(folder, out, *arguments):
    return cli.main(["export", str(out), "--generator", str(folder), "--no-metrics", *arguments])


def pixels(source):
    pipe = DriftPipeline.from_pretrained(source)
    return np.stack(pipe([0, 1, 2], 1.5, pipe.sample_generators(3, range(3))).images)


def test_round_trip(hub, generator_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    metrics, out = metrics_of(generator_folder, tmp_path / "protocol.json"), tmp_path / "out"
    command = ["export", "out", "--generator", str(generator_folder), "--metrics", str(metrics)]
    assert cli.main([*command, "--push", "me/fish"]) == 0
    told = capfd.readouterr()
    assert told.out.splitlines()[-1] == f"pushed to {hub.url}/me/fish (private)"
    repository = hub.repositories["me/fish"]
    assert repository.private and len(repository.commits) == 2
    local = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.*")}
    assert repository.files == {".gitattributes": repository.files[".gitattributes"], **local}
    said = [*local.values(), *hub.objects.values(), (told.out + told.err).encode()]
    assert not any(TOKEN.encode() in content for content in said)
    card = ModelCard(local["README.md"].decode())
    assert 'from_pretrained("me/fish")' in card.text and card.data.model_name == "fish"

    assert np.array_equal(pixels("me/fish"), pixels("out"))
    for source in ("me/fish", "out"):
        sampled = ["sample", source, "--classes", "0", "2", "--count", "3", "--out", f"{source[-3:]}.png"]
        assert cli.main([*sampled, "--device", "cpu"]) == 0
    assert (tmp_path / "ish.png").read_bytes() == (tmp_path / "out.png").read_bytes()


def test_another_push_is_a_commit_that_leaves_nothing_stale(hub, generator_folder, tmp_path):
    repository = hub.repositories["lab/fish"] = Repository(private=True)
    stale = "generator/diffusion_pytorch_model-00001-of-00002.safetensors"
    repository.commits.append({stale: b"old", "generator.onnx": b"old", "LICENSE": b"own", "README.md": b""})
    assert export(generator_folder, tmp_path / "out", "--push", "lab/fish") == 0
    assert len(repository.commits) == 3 and repository.private
    assert repository.files["LICENSE"] == b"own" and repository.files["README.md"]
    assert not {stale, "generator.onnx"} & repository.files.keys()
    assert export(generator_folder, tmp_path / "out", "--push", "lab/fish", "--force") == 0
    assert len(repository.commits) == 3  # nothing had changed
    other = write_generator(tmp_path / "other", seed=1)
    assert export(other, tmp_path / "out", "--push", "lab/fish", "--force") == 0
    assert len(repository.commits) == 4
    assert np.array_equal(pixels("lab/fish"), pixels(other))


def test_public_is_asked_for_and_comes_last(hub, generator_folder, tmp_path):
    assert export(generator_folder, tmp_path / "out", "--push", "me/new", "--public") == 0
    assert not hub.repositories["me/new"].private
    commit, publish = "POST /api/models/me/new/commit/main", "PUT /api/models/me/new/settings"
    assert hub.asked.index(commit) < hub.asked.index(publish)
    hub.repositories["me/open"] = Repository(private=False)
    assert export(generator_folder, tmp_path / "open", "--push", "me/open", "--public") == 0
    assert "model_index.json" in hub.repositories["me/open"].files
    assert "PUT /api/models/me/open/settings" not in hub.asked


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("fish", {}, "is no OWNER/NAME"),
        ("me/fish/x", {}, "is no OWNER/NAME"),
        ("me/-fish", {}, "is no OWNER/NAME"),
        (
            "me/fish",
            {"token": None},
            "nobody is logged in to the Hugging Face hub; run hf auth login",
        ),
        ("me/fish", {"token": "hf_wrong"}, "Invalid user token. The token from HF_TOKEN"),
        ("me/fish", {"token": "hf_private\x07"}, "has characters that no token has"),
        ("you/fish", {}, "this login may write to lab, me; name one of these"),
        ("club/fish", {}, "this login may only read in club"),
        ("me/fish", {"role": "read"}, "the token may only read"),
        ("me/open", {}, "is there and public; add --public"),
        ("me/fish", {"broken": "whoami"}, "Server disconnected without sending a response"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_work(
    hub, generator_folder, tmp_path, monkeypatch, capsys, name, change, told
):
    hub.repositories["me/open"] = Repository(private=False)
    if "token" in change:
        monkeypatch.setenv("HF_TOKEN", change["token"] or "")
    if "role" in change:
        hub.user["auth"] = {"accessToken": {"role": "read"}}
    hub.broken = change.get("broken")
    assert export(generator_folder, tmp_path / "out", "--push", name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --push {name}: ") and told in line
    assert (change.get("token") or TOKEN) not in line and "private" not in line
    assert not (tmp_path / "out").exists() and hub.repositories.keys() == {"me/open"}
    assert {request.partition(" ")[0] for request in hub.asked} <= {"GET"}


def test_a_fine_grained_token_may_name_its_organisations_in_its_scopes_only(hub, generator_folder, tmp_path):
    scope = {"entity": {"type": "org", "name": "lab"}, "permissions": ["repo.write"]}
    token = {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}
    hub.user = {"name": "me", "auth": {"accessToken": token}}
    assert export(generator_folder, tmp_path / "out", "--push", "lab/fish") == 0


def test_public_without_push_is_refused(generator_folder, tmp_path, capsys):
    assert export(generator_folder, tmp_path / "out", "--public") == 2
    assert "--public: there is nothing to publish" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["POST .*/commit/", "PUT /lfs/", "POST /api/repos", "GET .*/tree/"])
def test_after_a_failure_the_folder_is_whole_and_the_same_command_goes_on(
    hub, generator_folder, tmp_path, monkeypatch, capfd, broken
):
    no_waiting = SimpleNamespace(sleep=lambda _: None, time=_http.time.time)
    monkeypatch.setattr(_http, "time", no_waiting)
    hub.broken, out = broken, tmp_path / "out"
    assert export(generator_folder, out, "--push", "me/fish", "--public") == 2
    *_, line = capfd.readouterr().err.splitlines()
    assert line.startswith("error: --push me/fish: the upload ended early (Server disconnected without")
    assert line.endswith(f"{out} is whole, and the same command with --force goes on")
    assert len(pixels(out)) == 3
    assert all(repository.private for repository in hub.repositories.values())
    sent, hub.broken = set(hub.objects), None
    hub.asked.clear()
    assert export(generator_folder, out, "--push", "me/fish", "--public", "--force") == 0
    assert not {f"PUT /lfs/{oid}" for oid in sent} & set(hub.asked)
    assert np.array_equal(pixels("me/fish"), pixels(out))


def test_what_the_hub_says_of_the_card_is_told_in_one_line(hub, generator_folder, tmp_path, capfd):
    assert export(generator_folder, tmp_path / "out", "--push", "me/fish", "--license", "MIT") == 2
    *_, line = capfd.readouterr().err.splitlines()
    assert 'the upload ended early ("license" must be one of [mit]);' in line


RUNS = """
import sys
from drift.cli import main
assert main(["export", "out", "--generator", sys.argv[1], "--no-metrics", "--push", "me/fish"]) == 0
for source in ("me/fish", "out"):
    assert main(["sample", source, "--count", "2", "--device", "cpu", "--out", f"{source[-3:]}.png"]) == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("xet", [False, True])
def test_as_one_runs_it(generator_folder, tmp_path, xet):
    """With Xet on, huggingface_hub commits in another way; that hub then takes all files as small ones."""
    with running(large=() if xet else (".safetensors",)) as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        variables |= {"HF_HUB_DISABLE_XET": str(int(not xet)), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", RUNS, str(generator_folder)],
            cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.url}/me/fish (private)" in done.stdout and TOKEN not in done.stdout + done.stderr
    assert (tmp_path / "ish.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    assert bool(hub.objects) == (not xet)
