"""Artifacts as of another Git revision, through DVC."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from drift.runtime.errors import UserError
from drift.runtime.files import replace_folder
from drift.runtime.work import work_root


def fetch_revision(path: str | Path, revision: str) -> Path:
    """A copy of the folder `path`, which DVC tracks, as of `revision` of this repository.

    It is made by `dvc get`, from DVC's cache or remote, and kept in the work folder under the commit's name.
    Raises `UserError` if `path` is not below the current folder, there is no such revision, or Git or DVC
    cannot get the folder, with their reason.
    """
    path, given = Path(os.path.relpath(path)), path
    if path.parts[:1] in ((), ("..",)):
        raise UserError(f"{given} as of {revision}: is not below {Path.cwd()}; change into the project")
    commit = _git(
        revision, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"
    ) or _experiment(revision)
    kept = work_root() / "revisions" / commit[:16] / path
    if kept.is_dir():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    fresh = kept.with_name(f".{kept.name}.{os.getpid()}")
    # DVC looks from the top of the Git repository; what it would keep silent with --quiet are its errors
    below = _git(revision, "rev-parse", "--show-prefix") + path.as_posix()
    command = [sys.executable, "-m", "dvc", "get", "--rev", commit, "--out", str(fresh), ".", below]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not fresh.is_dir():
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            reason = errors[0].removeprefix("ERROR: ") if errors else "it is no folder"
            raise UserError(
                f"{path} as of {revision}: DVC cannot get it ({reason}); dvc pull it there, or name another "
                "revision"
            )
        replace_folder(fresh, kept)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return kept


def _git(revision: str, *arguments: str) -> str:
    """What a Git command prints; "" if it fails without a reason. Raises `UserError` with its reason."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"--rev {revision}: needs git, which is not installed; install it") from None
    if done.returncode and done.stderr.strip():
        raise UserError(f"--rev {revision}: git says: {' '.join(done.stderr.split())}")
    return "" if done.returncode else done.stdout.rstrip("\n")


def _experiment(name: str) -> str:
    """The commit of the DVC experiment `name`."""
    commits = _git(name, "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}").split()
    if len(commits) != 1:
        raise UserError(f"--rev {name}: no revision or experiment of this name in this Git repository")
    return commits[0]
