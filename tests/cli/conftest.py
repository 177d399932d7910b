"""Commands as a user calls them."""

import pytest

from drift import cli


@pytest.fixture
def refusal(generator_folder, tmp_path, monkeypatch, capsys):
    """What a command that draws refuses in one line: offline, in an empty folder, with exit code 2."""

    def told(command: str, arguments: list[str]) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        source = [] if arguments[0] == "nowhere" else [str(generator_folder)]
        assert cli.main([command, *source, *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        return error

    return told
