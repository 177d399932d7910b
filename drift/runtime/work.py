"""Work in progress of a stage: where it lives, whose it is, and whether it may go on.

DVC deletes a stage's outputs before it runs the stage, so unfinished work lives in
`.work/<stage>/<fingerprint>/` (`DRIFT_WORK_DIR` moves `.work`), where the fingerprint is a hash of the
settings and inputs that decide the result. Running the same command again goes on from there.
"""

import ast
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ruamel.yaml import YAML

from drift.runtime.errors import UserError
from drift.runtime.files import atomic_write, check_writable, move, replace_folder, write_json
from drift.runtime.lock import Lock

SETTINGS_FILE = "settings.yaml"


def fingerprint(decides: Mapping[str, Any]) -> str:
    """16 hex digits of a hash of everything that decides a result; `decides` is JSON-serialisable."""
    canonical = json.dumps(decides, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


PLUMBING = frozenset(
    f"drift/{name}.py"
    for name in (
        *("errors", "files", "hub", "launch", "lock", "params", "progress", "signals", "work"),
        *("evaluation/report", "training/inputs", "training/log"),
    )
)
"""They move files, read settings, start processes and talk; no number depends on them."""


def code_digest() -> str:
    """16 hex digits of a hash of the project's modules that this process has imported.

    Of what they do: neither comments, docstrings and layout count, nor modules of `PLUMBING`.
    """
    root = Path(__file__).resolve().parents[2]
    files = {Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    ours = {f.relative_to(root).as_posix(): f for f in files if f.is_relative_to(root)}
    digest = hashlib.sha256()
    for name in sorted(ours):
        if name.startswith(("drift/", "stages/")) and name.endswith(".py") and name not in PLUMBING:
            digest.update(f"{name}\0{without_words(ours[name].read_text(encoding='utf-8'))}\0".encode())
    return digest.hexdigest()[:16]


def without_words(source: str) -> str:
    """Python source without comments and docstrings, in one layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            said = [n for n in body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
            node.body = [n for n in body if n not in said] or [ast.Pass()]
    return ast.unparse(tree)


def dvc_hash(path: Path) -> str:
    """What DVC calls a file or a folder by: the MD5 of its bytes, or that of its listing with `.dir`."""
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
    """What the `work.json` of a work folder says; None if it is missing or damaged."""
    try:
        return json.loads((folder / "work.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def size_of(folder: Path) -> int:
    """Bytes that are free once `folder` is removed: of files that have no other name."""
    facts = (path.lstat() for path in folder.rglob("*"))
    return sum(fact.st_size for fact in facts if fact.st_nlink == 1)


class Work:
    """The work folder of one stage with one fingerprint, locked against a second run; a context manager.

    `folder` holds the stage's own files; `note` is what `work.json` says of the run: what decides it,
    and the digests of the code that has worked on it, oldest first.
    """

    def __init__(
        self,
        stage: str,
        decides: Mapping[str, Any],
        *,
        fresh: bool = False,
        first: bool = True,
        remarks: Sequence[str] = (),
    ):
        """`first`: whether this process manages the folder; other ranks only look up where it is.

        `fresh`: start over, and set aside what is there. `remarks` on the settings go to the screen, and into
        the settings file. Raises `UserError` if the folder cannot be written or another process is at work in
        it.
        """
        self.stage, self.decides, self.fresh, self.first = stage, dict(decides), fresh, first
        self.folder = work_root() / stage / fingerprint(decides)
        self.remarks = list(remarks)
        self.code: list[str] = []
        self._lock = Lock(self.folder)

    def __enter__(self) -> "Work":
        if self.first:
            check_writable(self.folder.parent)
            if not self._lock.acquire():
                raise UserError(
                    f"{self.folder}: another run of {self.stage} with the same settings and inputs is at "
                    f"work there; wait for it, or end it ({self._lock.holder()})"
                )
            for remark in self.remarks:
                print(f"{self.stage}: {remark}", flush=True)
            try:
                self._prepare()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
                self._tell(f"finished already in {self.folder}, gives its result again (--fresh starts over)")
            elif changed:
                self._tell(
                    f"the code has changed since {self.folder} was last worked on; going on all the same, as "
                    "the settings file will tell (--fresh starts over)"
                )
        others = [f for f in self.folder.parent.iterdir() if (read_note(f) or {}).get("finished")]
        if others := [folder for folder in others if folder != self.folder]:
            gigabytes = sum(map(size_of, others)) / 1e9
            where = f"{len(others)} more in {self.folder.parent}"
            self._tell(f"{where}, {gigabytes:.1f} GB, have finished; drift clean frees what DVC has stored")
        if self.code[-1:] != [now]:
            self.code = [*self.code, now]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_note(finished=finished)

    def _set_aside(self, reason: str) -> None:
        numbered = (self.folder.with_name(f"{self.folder.name}-{number}") for number in itertools.count(1))
        aside = next(folder for folder in numbered if not folder.exists())
        move(self.folder, aside)
        self._tell(f"starting over ({reason}); what was there is now in {aside}")

    def _tell(self, what: str) -> None:
        print(f"{self.stage}: {what}", flush=True)

    def _write_note(self, *, finished: bool, result: str | None = None) -> None:
        note = {"stage": self.stage, "decides": self.decides, "code": self.code, "finished": finished}
        write_json(self.folder / "work.json", note | {"result": result})

    def publish(self, source: Path, destination: Path) -> None:
        """Add the resolved settings to the finished folder `source` and rename it to `destination`.

        The settings file tells what decides the result and how it came about, and nothing that changes
        from run to run, so that equal results have equal bytes.
        """
        import torch  # here, as `drift watch` reads work folders and would wait for it

        how: dict[str, Any] = {"code": list(self.code), "torch": str(torch.__version__)}
        if self.remarks:
            how["remarks"] = self.remarks
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        with atomic_write(source / SETTINGS_FILE) as file:
            yaml.dump({"stage": self.stage, "decides": self.decides, "how": how}, file)
        replace_folder(source, destination)
        self.finish(destination)
        self._tell(f"wrote {destination}")

    def finish(self, result: Path) -> None:
        """Mark the run as finished, with the file or folder that it has made.

        The same run started again makes that again from what it has in its folder.
        """
        self._write_note(finished=True, result=dvc_hash(result))
