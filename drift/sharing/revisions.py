"""Artifacts as of another Git revision, through DVC."""

import os
import shutil
from pathlib import Path

from drift.runtime.errors import UserError
from drift.runtime.files import replace_folder
from drift.runtime.work import work_root


def fetch_revision(path: str | Path, revision: str) -> Path:
    """A copy of the folder `path`, which DVC tracks, as of `revision`: a branch, tag, commit or experiment.

    It comes from DVC's cache or remote, and is kept in the work folder under the commit's name. Raises
    `UserError` if `path` is not below the current folder, or with the reason of Git or DVC.
    """
    from dvc.api import DVCFileSystem

    path, given = Path(os.path.relpath(path)), path
    if path.parts[:1] in ((), ("..",)):
        raise UserError(f"{given} as of {revision}: is not below {Path.cwd()}; change into the project")
    try:
        # From the top of the Git repository, of which the project may be a subfolder
        files = DVCFileSystem(rev=revision, subrepos=True)
        kept = work_root() / "revisions" / files.repo.get_rev()[:16] / path
        if kept.is_dir():
            return kept
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_name(f".{kept.name}.{os.getpid()}")
        below = Path.cwd().relative_to(files.repo.scm.root_dir) / path
        files.get(f"/{below.as_posix()}/", str(fresh), recursive=True)
        replace_folder(fresh, kept)
    except Exception as error:  # of DVC, Git's library, a storage
        shutil.rmtree(fresh, ignore_errors=True)
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} as of {revision}: DVC cannot get it ({type(error).__name__}: {reason}); "
            "dvc pull it there, or name another revision"
        ) from None
    return kept
