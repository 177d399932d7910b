"""Artifacts as of another Git revision, through DVC."""

import os
import tempfile
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
        below = f"/{(Path.cwd().relative_to(files.repo.scm.root_dir) / path).as_posix()}"
        kept = work_root() / "revisions" / files.repo.get_rev()[:16] / path
        if kept.is_dir():
            return kept
        if not files.isdir(below):
            raise NotADirectoryError(f"it has no folder {path}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=f".{kept.name}-") as fresh:
            files.get(below, f"{fresh}/copy", recursive=True)
            replace_folder(f"{fresh}/copy", kept)
    except Exception as error:  # DVC's, those of Git's libraries and of a storage have no type in common
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} as of {revision}: DVC cannot get it ({reason}); dvc pull it there, or name another "
            "revision"
        ) from None
    return kept
