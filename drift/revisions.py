"""Artifacts as of another Git revision, through DVC."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from drift.errors import UserError
from drift.files import replace_folder
from drift.work import work_root


def fetch_revision(path: str | Path, revision: str) -> Path:
    """A copy of the folder `path`, which DVC tracks, as of `revision` of this repository.

    It is made by `dvc get`, from DVC's cache or remote, and kept in the work folder under the commit's name.
    Raises `UserError` if `path` is not below the current folder, there is no such revision, or DVC cannot get
    the folder.
    """
    path, given = Path(os.path.relpath(path)), path
    if path.parts[:1] in ((), ("..",)):
        raise UserError(f"{given} as of {revision}: is not below {Path.cwd()}; change into the project")
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"],
        capture_output=True,
        text=True,
    )
    commit = found.stdout.strip()
    if found.returncode or not commit:
        commit = _experiment(revision)
    kept = work_root() / "revisions" / commit[:16] / path
    if kept.is_dir():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    fresh = kept.with_name(f".{kept.name}.{os.getpid()}")
    command = [
        sys.executable,
        "-m",
        "dvc",
        "get",
        "--quiet",
        "--rev",
        commit,
        "--out",
        str(fresh),
        ".",
        str(path),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not fresh.is_dir():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = lines[0].removeprefix("ERROR: ") if lines else "it is no folder"
            raise UserError(
                f"{path} as of {revision}: DVC cannot get it ({reason}); dvc pull it there, or name another "
                "revision"
            )
        replace_folder(fresh, kept)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return kept


def _experiment(name: str) -> str:
    """The commit of the DVC experiment `name`."""
    listed = subprocess.run(
        ["git", "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}"],
        capture_output=True,
        text=True,
    )
    commits = listed.stdout.split()
    if listed.returncode or len(commits) != 1:
        raise UserError(f"--rev {name}: no revision or experiment of this name in this Git repository")
    return commits[0]
