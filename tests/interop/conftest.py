"""A hub to push to."""

import pytest
from hub_stub import TOKEN, running


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one's own for huggingface_hub in this process, where `me` is logged in."""
    from huggingface_hub import constants

    with running() as hub:
        changed = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in changed.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
