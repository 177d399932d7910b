"""YAML, read by the parser that DVC uses; mistakes in it as one line."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from drift.runtime.errors import UserError


class _Constructor(SafeConstructor):
    """Dates stay texts: no setting is a date, but a folder may have the name of one."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def read_yaml(path: str | Path, way_out: str) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises `UserError` with one line that ends in `way_out`.

    YAML 1.2: `1e-4` is a number, `no` is a text. A key that is given twice is a mistake.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {way_out}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}: line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8"
        ) from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path}:{where} is not YAML: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not settings; {way_out}")
    return content


def one_line(error: ValidationError, known: Iterable[str], moved: Mapping[str, str]) -> str:
    """The first mistake that pydantic found, with key, value and what is allowed; and the number of others.

    `known`: all dotted keys, among which a suggestion for a misspelt one is sought. `moved`: what has become
    of keys of earlier versions.
    """
    problems = error.errors(include_url=False)
    # A misspelt key is reported twice, as unknown and as missing: the unknown one says more
    problems.sort(key=lambda p: {"extra_forbidden": 0, "missing": 2}.get(p["type"], 1))
    first, more = problems[0], len(problems) - 1
    key, value = ".".join(map(str, first["loc"])), show(first["input"])
    if first["type"] == "extra_forbidden":
        line = f"unknown key {key} (value {value}); {_way_out(key, known, moved)}"
    elif first["type"] == "missing":
        line = f"missing key {key}: presets/ holds complete files with a value for it"
    elif first["type"] == "value_error":  # of our own validators, which name the key
        reason = first.get("ctx", {})["error"]
        line = f"{key}.{reason}" if key else str(reason)
    else:
        message = first["msg"].removeprefix("Input should be ").replace("'", "")
        line = f"{key} = {value}: allowed: {message[0].lower()}{message[1:]}"
    return f"{line} (and {more} more)" if more else line


def _way_out(key: str, known: Iterable[str], moved: Mapping[str, str]) -> str:
    if key in moved:
        return f"it is now {moved[key]}"
    name = key.rpartition(".")[2]
    close = [other for other in known if other.rpartition(".")[2] == name]
    close += difflib.get_close_matches(key, list(known), n=1)
    return f"did you mean {close[0]}?" if close else "remove it"


def show(value: Any) -> str:
    """A value as a message shows it, cut short."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
