"""Files from the Hugging Face hub, or from what it once gave."""

from collections.abc import Sequence
from pathlib import Path

from drift.errors import UserError


def download(
    repository: str, revision: str | None, patterns: Sequence[str], *, what: str, way_out: str
) -> Path:
    """The folder of the hub's cache with the files of `repository` that match `patterns`, of a `revision`.

    What is not there is downloaded. Raises `UserError`, which begins with `what` and ends with the `way_out`,
    if that cannot be done.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of any type: the hub's client lets through those of its HTTP library
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        at = f" at revision {revision}" if revision else ""
        raise UserError(f"{what} cannot be had from the Hugging Face hub{at} ({reason}); {way_out}") from None
