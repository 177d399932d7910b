"""Work in progress of a stage: where it lives, and whether it is resumed.

DVC deletes a stage's outputs before it runs the stage, so unfinished work lives in
`.work/<stage>/<fingerprint>/` (`DRIFT_WORK_DIR` moves `.work`). The fingerprint is a hash of the settings and
inputs of the run. The same command resumes there. Nothing is deleted: `drift clean` does that.
"""

import ast
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from drift.runtime.errors import UserError
from drift.runtime.files import atomic_write, check_writable, replace_folder, write_json
from drift.runtime.lock import Lock

SETTINGS_FILE = "settings.yaml"
_ROOT = Path(__file__).parents[2]
PLUMBING = (
    "drift/runtime/",  # but for the seeds
    "drift/settings/",
    "drift/evaluation/report.py",
    "drift/training/inputs.py",
    "drift/training/log.py",
    "drift/training/tensorboard.py",
)
"""Modules that move files, read settings, start processes and talk: no number depends on them."""


class _Dumper(yaml.SafeDumper):
    """Quotes texts that are numbers in YAML 1.2 and not in PyYAML's 1.1, such as the digest 12e34."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """16 hex digits of a hash of the settings and inputs of a run, which are JSON-serialisable."""
    canonical = json.dumps(inputs, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def code_digest() -> str:
    """16 hex digits of a hash of the project's modules that this process has imported, but for `PLUMBING`."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    paths = {Path(file).resolve() for file in files if file}
    names = {path.relative_to(_ROOT).as_posix() for path in paths if path.is_relative_to(_ROOT)}
    digest = hashlib.sha256()
    for name in sorted(names):
        plumbing = name.startswith(PLUMBING) and name != "drift/runtime/seeds.py"
        if name.startswith(("drift/", "stages/", "experiments/")) and name.endswith(".py") and not plumbing:
            source = (_ROOT / name).read_text(encoding="utf-8")
            digest.update(f"{name}\0{without_words(source)}\0".encode())
    return digest.hexdigest()[:16]


def without_words(source: str) -> str:
    """Python source without comments and docstrings, in one layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            texts = [n for n in body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
            body[:] = [n for n in body if n not in texts] or [ast.Pass()]
    return ast.unparse(tree)


def dvc_hash(path: Path) -> str:
    """DVC's name of a file or a folder: the MD5 of its bytes, or that of its listing with `.dir`."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    listing = [{"md5": dvc_hash(file), "relpath": name} for name, file in files]
    return hashlib.md5(json.dumps(listing).encode(), usedforsecurity=False).hexdigest() + ".dir"


def work_root() -> Path:
    """The folder of all stages' work."""
    return Path(os.environ.get("DRIFT_WORK_DIR") or ".work")


def read_note(folder: Path) -> dict | None:
    """The `work.json` of a work folder; None if it is missing or damaged."""
    try:
        return json.loads((folder / "work.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def settings_in_force(made_by: Mapping[str, Any]) -> dict[str, Any]:
    """What a settings file says of the run, with the defaults of that time; older files leave these out."""
    return {**made_by.get("decides", {}), **made_by.get("settings", {})}


def size_of(folder: Path) -> int:
    """Bytes that removing `folder` frees: those of files that have no other name."""
    facts = (path.lstat() for path in folder.rglob("*"))
    return sum(fact.st_size for fact in facts if fact.st_nlink == 1)


class Work:
    """The work folder of one run, `folder`, locked against a second one; a context manager.

    `code` has the digests of the code that has worked on it, oldest first.
    """

    def __init__(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        *,
        fresh: bool = False,
        first: bool = True,
        remarks: Sequence[str] = (),
    ):
        """`inputs`: the settings and inputs that the result depends on.

        `fresh`: start over, and set aside what is there. `first`: whether this process manages the folder;
        the others only learn where it is. `remarks` on the settings are printed and kept in the settings
        file. Entering raises `UserError` if the folder cannot be written or another process works in it.
        """
        self.stage, self.inputs, self.fresh, self.first = stage, dict(inputs), fresh, first
        self.folder = work_root() / stage / fingerprint(inputs)
        self.remarks = list(remarks)
        self.code: list[str] = []
        self._lock = Lock(self.folder)

    def __enter__(self) -> "Work":
        if not self.first:
            return self
        check_writable(self.folder.parent)
        if not self._lock.acquire():
            raise UserError(
                f"{self.folder}: another run of {self.stage} with the same settings and inputs is at work "
                f"there; wait for it, or end it ({self._lock.holder()})"
            )
        try:
            for remark in self.remarks:
                self._say(remark)
            self._prepare()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def _prepare(self) -> None:
        now, note, finished = code_digest(), read_note(self.folder), False
        changed = note is not None and note["code"][-1:] != [now]
        if self.fresh and self.folder.exists():
            self._set_aside("--fresh")
        elif note is not None and note["finished"] and changed:
            self._set_aside("other code has finished it")
        elif note is not None:
            self.code, finished = note["code"], note["finished"]
            if finished:
                self._say(f"finished already in {self.folder}: the result is reused (--fresh starts over)")
            elif changed:
                self._say(
                    f"the code has changed since the last work in {self.folder}; the run resumes, and its "
                    "settings file records the change (--fresh starts over)"
                )
        others = [f for f in self.folder.parent.iterdir() if (read_note(f) or {}).get("finished")]
        if others := [folder for folder in others if folder != self.folder]:
            gigabytes = sum(map(size_of, others)) / 1e9
            where = f"{len(others)} more in {self.folder.parent}"
            self._say(f"{where}, {gigabytes:.1f} GB, have finished; drift clean frees what DVC has stored")
        if self.code[-1:] != [now]:
            self.code = [*self.code, now]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_note(finished=finished)

    def _set_aside(self, reason: str) -> None:
        numbered = (self.folder.with_name(f"{self.folder.name}-{number}") for number in itertools.count(1))
        aside = next(folder for folder in numbered if not folder.exists())
        replace_folder(self.folder, aside)
        self._say(f"starting over ({reason}); what was there is now in {aside}")

    def _say(self, what: str) -> None:
        print(f"{self.stage}: {what}", flush=True)

    def _write_note(self, *, finished: bool, result: str | None = None) -> None:
        note = {"stage": self.stage, "decides": self.inputs, "code": self.code, "finished": finished}
        write_json(self.folder / "work.json", note | {"result": result})

    def publish(self, source: Path, destination: Path, settings: Mapping[str, Any] | None = None) -> None:
        """Add the settings file to the finished folder `source` and rename it to `destination`.

        `settings` are all values in force, where `inputs` leave out the defaults: see `settings_in_force`.
        The settings file holds nothing that changes from run to run: equal results have equal bytes.
        """
        import torch  # here, as `drift watch` reads work folders and would wait for it

        how: dict[str, Any] = {"code": list(self.code), "torch": str(torch.__version__)}
        if self.remarks:
            how["remarks"] = self.remarks
        content = {"stage": self.stage, "decides": self.inputs, "how": how}
        if settings is not None:
            content["settings"] = dict(settings)
        with atomic_write(source / SETTINGS_FILE) as file:
            yaml.dump(content, file, _Dumper, encoding="utf-8", allow_unicode=True)
        replace_folder(source, destination)
        self.finish(destination)
        self._say(f"wrote {destination}")

    def finish(self, result: Path) -> None:
        """Mark the run as finished, with the file or folder that it has made."""
        self._write_note(finished=True, result=dvc_hash(result))
