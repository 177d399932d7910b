"""Files from the Hugging Face hub."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from drift.runtime.errors import UserError


def download(
    repository: str, revision: str | None, patterns: Sequence[str], *, what: str, way_out: str, **options: Any
) -> Path:
    """The folder in the hub's cache that holds the files of `repository` matching `patterns`.

    `options` go to huggingface_hub's `snapshot_download`. If that fails for any reason, a cached copy with
    all the files is used. Without one raises `UserError`: `what`, the reason, and `way_out`.
    """
    from huggingface_hub import snapshot_download

    fetch = partial(
        snapshot_download, repository, revision=revision, allow_patterns=list(patterns), **options
    )
    try:
        return Path(fetch())
    except Exception as error:  # of any type: those of the HTTP library pass through, such as a proxy's
        with suppress(Exception):
            cached = Path(fetch(local_files_only=True))
            if all(any(cached.glob(pattern)) for pattern in patterns):
                return cached
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        at = f" at revision {revision}" if revision else ""
        raise UserError(f"{what} cannot be had from the Hugging Face hub{at} ({reason}); {way_out}") from None
