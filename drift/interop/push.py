"""A folder of `drift export` on the Hugging Face hub.

The token is huggingface_hub's own: the variable HF_TOKEN, or what `hf auth login` has stored. It is in no
argument, file or message of ours.
"""

import re
from pathlib import Path
from typing import Any

from drift.runtime.errors import UserError

_TOKEN = re.compile(r"[\w.~+/-]+=*", re.ASCII)  # RFC 6750; errors of the HTTP library quote any other
_OURS = [
    *("generator/*", "vae/*", "samples.png", "settings.yaml"),
    *(f"{network}.onnx{end}" for network in ("generator", "decoder") for end in ("", ".data")),
]
"""What an earlier export may have left in a repository, such as shards of larger weights."""
_LOG_IN = "run hf auth login, or set HF_TOKEN"
_LONGEST_REASON = 300


def check_push(name: str, public: bool) -> None:
    """Ask the hub whether an export can be pushed to `name`, and change nothing there.

    Raises `UserError` if it is no OWNER/NAME, nobody is logged in, the hub does not answer or refuses the
    token, the owner is neither the user nor an organisation that the user may write to, or the repository is
    public and `public` is not asked for.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, RepositoryNotFoundError, validate_repo_id

    what = f"--push {name}"
    try:
        validate_repo_id(name)
        owner, _ = name.split("/")
    except (HFValidationError, ValueError):
        raise UserError(
            f"{what}: is no OWNER/NAME of the hub, which has letters, digits and - _ . and 96 of them at most"
        ) from None
    try:
        api = HfApi(token=_token(what))
        _require_owner(api.whoami(), owner, what)
        private = api.model_info(name).private
    except RepositoryNotFoundError:
        return
    except UserError:
        raise
    except Exception as error:  # of any type: those of the HTTP library pass through, as in runtime.hub
        raise UserError(
            f"{what}: the Hugging Face hub cannot be asked ({_reason(error)}); try again when hf auth whoami "
            "works, or leave --push out"
        ) from None
    if not private and not public:
        raise UserError(f"{what}: is there and public; add --public to publish to it, or name another")


def push(folder: Path, name: str, public: bool) -> str:
    """Upload `folder` as a commit to the repository `name`, and return its URL.

    A new repository is private until all is there, and then if not `public`. Of what is in an old one, an
    earlier export is replaced, and the rest left. After a failure, pushing again sends what is missing.
    Raises `UserError` if the hub refuses or ceases to answer.
    """
    from huggingface_hub import HfApi

    what = f"--push {name}"
    try:
        api = HfApi(token=_token(what))
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="drift export", delete_patterns=_OURS
        )
        if public and api.model_info(name).private:
            api.update_repo_settings(name, private=False)
    except UserError:
        raise
    except Exception as error:  # of any type, as above
        raise UserError(
            f"{what}: the upload ended early ({_reason(error)}); {folder} is whole, and the same command "
            "with --force goes on"
        ) from None
    return f"{api.endpoint}/{name}"


def _token(what: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        raise UserError(f"{what}: nobody is logged in to the Hugging Face hub; {_LOG_IN}")
    if not _TOKEN.fullmatch(token):
        raise UserError(f"{what}: the token has characters that no token has; {_LOG_IN}")
    return token


def _require_owner(who: dict[str, Any], owner: str, what: str) -> None:
    """`who` is the hub's answer to whoami."""
    token = who.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise UserError(f"{what}: the token may only read; {_LOG_IN}, with one that may write")
    scopes = token.get("fineGrained", {}).get("scoped", [])  # beside which organisations may be left out
    roles = {scope["entity"].get("name", "").partition("/")[0]: None for scope in scopes}
    roles |= {each["name"]: each.get("roleInOrg") for each in who.get("orgs", [])} | {who["name"]: "admin"}
    if owner not in roles:
        writable = ", ".join(name for name, role in roles.items() if name and role != "read")
        raise UserError(f"{what}: this login may write to {writable}; name one of these as the owner")
    if roles[owner] == "read":
        raise UserError(f"{what}: this login may only read in {owner}; ask for the role write there")


def _reason(error: BaseException) -> str:
    """The first cause in one line; what it caused, such as the end of a thread, tells less."""
    while error.__cause__ is not None and not hasattr(error, "server_message"):
        error = error.__cause__
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:_LONGEST_REASON].rstrip(". ")
