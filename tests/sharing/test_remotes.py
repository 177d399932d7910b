"""`drift remote` with the real rclone and DVC: a round trip, and that nothing is left however it ends."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from configobj import ConfigObj
from imports import ROOT

from drift import cli
from drift.sharing import remotes, webdav

DVC = (sys.executable, "-m", "dvc")
REMOTE = (sys.executable, "-m", "drift.cli", "remote")
PIPELINE = "stages: {make: {cmd: mkdir out && echo one > out/one && echo two > out/two, outs: [out]}}"
# In the place of DVC: notes what it was given, and waits
SLOW = """\
import os, pathlib, time
pathlib.Path(os.environ["SEEN"]).write_text(os.environ["DRIFT_STORAGE"])
time.sleep(60)
"""
WITH_SLOW = """\
import sys
from drift import cli
from drift.sharing import webdav
webdav.__file__ = sys.argv[1]
sys.exit(cli.main(["remote", "--", "dvc", "pull"]))
"""


class World:
    """A DVC project, a remote called store, and secret, which is store encrypted."""

    def __init__(self, folder: Path):
        self.folder, self.project, self.store = folder, folder / "project", folder / "store"
        for name in ("project", "store", "tmp"):
            (folder / name).mkdir()
        obscured = subprocess.check_output([remotes.find_rclone(), "obscure", "a password"], text=True)
        (folder / "rclone.conf").write_text(
            f"[store]\ntype = alias\nremote = {folder}/store\n\n"
            f"[secret]\ntype = crypt\nremote = store:encrypted\npassword = {obscured}\n"
        )
        self.environment = {
            **os.environ,
            "RCLONE_CONFIG": str(folder / "rclone.conf"),
            "TMPDIR": str(folder / "tmp"),
            "SEEN": str(folder / "seen"),
            **{f"DVC_{level}_CONFIG_DIR": str(folder / level) for level in ("SYSTEM", "GLOBAL")},
            "DVC_SITE_CACHE_DIR": str(folder / "site"),
            "DVC_NO_ANALYTICS": "1",
            "CI": "1",  # DVC looks for no update
            "GIT_CONFIG_GLOBAL": os.devnull,
            "http_proxy": "http://127.0.0.1:9",  # nobody is there
            "https_proxy": "socks5h://127.0.0.1:9",  # which httpx cannot use as it is installed
        }
        for who in ("AUTHOR", "COMMITTER"):
            self.environment |= {f"GIT_{who}_NAME": "drift", f"GIT_{who}_EMAIL": "drift@example.org"}
        self.run("git", "init", "--quiet", "--initial-branch", "trunk")
        (self.project / ".dvc").mkdir()  # what dvc init makes
        (self.project / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
        self.config = self.project / ".dvc/config"
        self.refer_to("store/results")
        (self.store / "results").mkdir()
        (self.project / "dvc.yaml").write_text(PIPELINE)

    def refer_to(self, *places: str, **config: dict) -> None:
        """Remotes a, b ... of DVC that refer to `places`, and what else its configuration holds."""
        written = ConfigObj({**config}, encoding="utf-8")
        for name, place in zip("ab", places, strict=False):
            written[f'remote "{name}"'] = {"url": f"remote://drift-remote/{place}"}
        with self.config.open("wb") as file:
            written.write(file)

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command, cwd=cwd or self.project, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def commit(self) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "state")

    def start_slow(self) -> tuple[subprocess.Popen, dict]:
        """`drift remote` at work, with a command that takes long; what that was given."""
        (self.folder / "slow.py").write_text(SLOW)
        process = subprocess.Popen(
            [sys.executable, "-c", WITH_SLOW, self.folder / "slow.py"],
            cwd=self.project,
            env=self.environment | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        seen = self.folder / "seen"
        wait_for(lambda: seen.exists() and seen.read_text())
        return process, json.loads(seen.read_text())

    def files(self) -> list[Path]:
        return [path for path in self.store.rglob("*") if path.is_file()]

    def processes(self) -> dict[str, psutil.Process]:
        found = {}
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("SEEN") == self.environment["SEEN"]
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found[f"{process.name()} {process.pid}"] = process
            except psutil.Error:
                pass
        return found


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    for process in world.processes().values():
        process.kill()


@pytest.fixture
def here(world, monkeypatch):
    """The world, for commands of this process."""
    monkeypatch.chdir(world.project)
    for name, value in world.environment.items():
        monkeypatch.setenv(name, value)
    return world


def run_remote(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["remote", *arguments])
    return caught.value.code


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["remote", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        "secret/results",
        "store/C#/1?& a%20b 100% C++$,:;=@",
        'store/it\'s[1] "日本" cafe\u0301~^|\\(run)*!',
    ],
)
def test_what_one_clone_pushes_another_pulls(world, place):
    """Through crypt and into folders whose names URLs would have to quote, whatever proxies are set."""
    world.refer_to(place)
    world.run(*DVC, "repro")
    world.commit()
    config = world.config.read_bytes()
    name, _, path = place.partition("/")
    pushed = world.run(*REMOTE, "--", "dvc", "push")
    assert "3 files pushed" in pushed.stdout
    assert f"{name}:{path} is served on 127.0.0.1:" in pushed.stderr and "ended with code 0" in pushed.stderr
    assert len(world.files()) == 3
    assert any(file.read_bytes() == b"one\n" for file in world.files()) == (name == "store")
    assert name == "secret" or all(file.is_relative_to(world.store / path) for file in world.files())

    clone = world.folder / "clone"
    world.run("git", "clone", "--quiet", str(world.project), str(clone))
    alone = world.run(*DVC, "pull", "-r", "a", cwd=clone, check=False)
    assert alone.returncode and "remote 'drift-remote' doesn't exist" in alone.stderr
    world.run(*REMOTE, "--", "dvc", "pull", cwd=clone)
    assert (clone / "out/two").read_text() == "two\n"
    assert "up to date" in world.run(*DVC, "status", cwd=clone).stdout
    for folder in (world.project, clone):
        assert (folder / ".dvc/config").read_bytes() == config
        assert not (folder / ".dvc/config.local").exists()
    assert not world.processes() and not list((world.folder / "tmp").glob("drift-remote-*"))


@pytest.mark.slow
def test_experiments_go_to_a_folder_given_by_hand_and_not_to_the_default(world):
    other = world.folder / "other"
    world.refer_to("store/results", **{"core": {"remote": "other"}, 'remote "other"': {"url": str(other)}})
    world.commit()
    world.run("git", "init", "--quiet", "--bare", str(world.folder / "origin"))
    world.run("git", "remote", "add", "origin", str(world.folder / "origin"))
    world.run("git", "push", "--quiet", "origin", "trunk")
    world.run(*DVC, "exp", "run", "--quiet", "--name", "tried")
    world.run(*REMOTE, "--remote", "store:by hand", "--", "dvc", "exp", "push", "origin", "tried")
    assert "refs/exps/" in world.run("git", "ls-remote", "origin").stdout
    assert len([file for file in world.files() if file.is_relative_to(world.store / "by hand")]) == 3
    assert not other.exists()


def test_only_the_command_gets_the_password(world):
    process, given = world.start_slow()
    address = given["settings"]["url"].removeprefix("webdav://").partition("/")[0]
    password = given["settings"]["password"]
    assert len(password) > 20
    for other in psutil.process_iter(["cmdline"]):
        assert password not in " ".join(other.info["cmdline"] or [])
    [rclone] = [found for name, found in world.processes().items() if name.startswith("rclone")]
    listening = [c.laddr for c in rclone.net_connections() if c.status == psutil.CONN_LISTEN]
    assert [f"{found.ip}:{found.port}" for found in listening] == [address]
    assert address.startswith("127.0.0.1:")
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as caught:
        without_proxy.open(given["settings"]["url"].replace("webdav", "http") + "/")
    assert caught.value.code == 401
    process.terminate()
    process.communicate(timeout=30)


@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [
        (signal.SIGINT, True, 130),  # Ctrl-C in a terminal
        (signal.SIGTERM, False, 143),
        (signal.SIGHUP, False, 129),
        (signal.SIGKILL, False, -9),
    ],
)
def test_a_signal_leaves_nothing(world, number, whole_group, code):
    process, _ = world.start_slow()
    assert len(world.processes()) == 3  # drift, rclone, the command
    (os.killpg if whole_group else os.kill)(process.pid, number)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == code
    if number == signal.SIGKILL:  # the kernel ends the others; the log stays, which holds no secret
        wait_for(lambda: not world.processes())
    else:
        assert err.splitlines()[-1] == f"drift remote: {number.name}; the server is stopped"
        assert not world.processes() and not list((world.folder / "tmp").glob("drift-remote-*"))


def test_rclone_that_dies_ends_the_command(world):
    process, _ = world.start_slow()
    [rclone] = [found for name, found in world.processes().items() if name.startswith("rclone")]
    rclone.kill()
    line = process.communicate(timeout=30)[1].splitlines()[-1]
    assert process.returncode == 2
    assert line.startswith("error: rclone ended in the middle of the command (code -9): NOTICE: ")
    assert line.endswith("run it again: what was transferred stays")
    assert not world.processes()


def test_a_command_that_fails_hands_on_its_code(here, monkeypatch, capfd):
    (here.folder / "fails.py").write_text("raise SystemExit(7)")
    monkeypatch.setattr(webdav, "__file__", str(here.folder / "fails.py"))
    assert run_remote("--", "dvc", "pull") == 7
    assert "ended with code 7" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "a dvc command is needed after --, not nothing; say: drift remote -- dvc pull"),
        (["--", "git", "dvc"], "a dvc command is needed after --, not git dvc"),
        (["--remote", "stor:x", "--", "dvc", "pull"], "didn't find section in config file"),
        (["--remote", "store", "--", "dvc", "pull"], "store: is no rclone remote; write NAME:PATH"),
        (["--remote", "store:none", "--", "dvc", "pull"], "store:none: there is no such folder; correct the"),
        (["--remote", "store:x", "--", "dvc", "pull", "-r", "a"], "name two places; leave one away"),
    ],
)
def test_a_wrong_word_is_told_with_the_way_out(here, capsys, arguments, told):
    assert told in refused(capsys, *arguments)
    assert not here.files()


def test_what_dvc_refers_to_must_be_clear(here, capsys, tmp_path, monkeypatch):
    pull = ["--", "dvc", "pull"]
    here.refer_to("store/a", "store//b", **{'remote "c"': {"url": "/c"}})
    assert "several rclone remotes, a, b; choose one: drift remote -- dvc pull -r a" in refused(capsys, *pull)
    assert "store:/b: there is no such folder" in refused(capsys, *pull, "-rB")
    assert "no reference to an rclone remote; name one of a, b" in refused(capsys, *pull, "--remote=c")
    here.refer_to("store/a", "store//b", core={"remote": "b"})
    assert "store:/b: there is no such folder" in refused(capsys, *pull)
    here.refer_to("store//a", core={"remote": "c"}, **{'remote "c"': {"url": "/c"}})
    assert "store:/a: there is no such folder" in refused(capsys, *pull)  # ours, though c is the default
    here.refer_to()
    assert "refers to no rclone remote; dvc remote add NAME remote://drift-remote/" in refused(capsys, *pull)
    here.config.write_text("[unclosed\n")
    assert "DVC's configuration cannot be read" in refused(capsys, *pull)
    monkeypatch.chdir(tmp_path / "store")
    assert "is in no DVC project; change into one" in refused(capsys, *pull)


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(here, capsys, monkeypatch):
    how = "is not installed; pip install -c constraints.txt -e '.[share]'"
    with monkeypatch.context() as changed:
        changed.setattr(remotes.importlib.util, "find_spec", lambda name: None)
        assert f"dvc_webdav: DVC's WebDAV part {how}" in refused(capsys, "--", "dvc", "pull")
    monkeypatch.setenv("PATH", str(here.store))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(here.store))
    assert f"rclone: {how}" in refused(capsys, "--", "dvc", "pull")


def test_the_port_can_be_chosen_and_may_be_taken(here, capsys, monkeypatch):
    (here.folder / "nothing.py").touch()
    monkeypatch.setattr(webdav, "__file__", str(here.folder / "nothing.py"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert "address already in use" in refused(capsys, "--port", port, "--", "dvc", "status")
    assert run_remote("--port", port, "--", "dvc", "status") == 0
    assert f"is served on 127.0.0.1:{port} for: dvc status" in capsys.readouterr().err


def test_an_rclone_that_cannot_serve_says_why(here, capsys):
    (here.folder / "rclone.conf").write_text("[store]\ntype = sftp\nkey_file = /none\n")
    line = refused(capsys, "--remote", "store:x", "--", "dvc", "push")
    assert "store:x: rclone cannot reach it: " in line and "no such file" in line


def test_the_package_is_preferred_to_the_path(tmp_path, monkeypatch):
    for name in ("package", "path"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rclone").touch(mode=0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "package"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert remotes.find_rclone() == str(tmp_path / "package/rclone")
    shutil.rmtree(tmp_path / "package")
    assert remotes.find_rclone() == str(tmp_path / "path/rclone")


def test_the_project_names_its_storage_without_secrets():
    config = ConfigObj(str(ROOT / ".dvc/config"))
    found = {section: dict(values) for section, values in config.items() if section.startswith("remote")}
    assert found and all(values.keys() == {"url"} for values in found.values())
    assert "remote" not in config["core"]  # no default: dvc exp run would look it up
    assert "/config.local" in (ROOT / ".dvc/.gitignore").read_text().splitlines()
