"""Files from the Hugging Face hub, or from what it once gave."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from drift.runtime.errors import UserError


def download(
    repository: str, revision: str | None, patterns: Sequence[str], *, what: str, way_out: str, **options: Any
) -> Path:
    """The folder of the hub's cache with the files of `repository` that match `patterns`, of a `revision`.

    What is not there is downloaded, with the `options` of huggingface_hub's `snapshot_download`. What is
    there will do if the hub cannot be reached, for whatever reason. Raises `UserError`, which begins with
    `what` and ends with the `way_out`, if neither can be done.
    """
    from huggingface_hub import snapshot_download

    options |= {"revision": revision, "allow_patterns": list(patterns)}
    try:
        return Path(snapshot_download(repository, **options))
    except Exception as error:  # of any type: the hub's client lets through those of its HTTP library
        # It looks into its cache itself after some errors, and not after others, such as those of a proxy
        with suppress(Exception):
            kept = Path(snapshot_download(repository, **(options | {"local_files_only": True})))
            if all(any(kept.glob(pattern)) for pattern in patterns):
                return kept
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        at = f" at revision {revision}" if revision else ""
        raise UserError(f"{what} cannot be had from the Hugging Face hub{at} ({reason}); {way_out}") from None
