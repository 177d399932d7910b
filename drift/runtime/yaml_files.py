"""YAML as DVC reads it, and mistakes in it as one line."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from drift.runtime.errors import UserError

M = TypeVar("M", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.2: `1e-4` is a number, `no` and `2026-01-01` are texts. A key that is given twice is refused."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":bool", ":timestamp"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\.\d+|\d+\.\d*)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    "-+.0123456789",
)


def read_yaml(path: str | Path, way_out: str) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises `UserError` with one line that ends in `way_out`."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {way_out}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}: line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path}:{where} is not YAML: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not settings; {way_out}")
    return content


def read_settings(
    path: str | Path, kind: type[M], way_out: str, known: Iterable[str], moved: Mapping[str, str]
) -> M:
    """A YAML file as the model `kind`; for `known` and `moved` see `one_line`.

    Raises `UserError` with one line if the file is missing or not YAML, or a key or a value is wrong.
    """
    content = read_yaml(path, way_out)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {one_line(error, known, moved)}") from None


def one_line(error: ValidationError, known: Iterable[str], moved: Mapping[str, str]) -> str:
    """The first mistake that pydantic found, with key, value and what is allowed; and the number of others.

    `known`: all dotted keys, among which a suggestion for a misspelt one is sought. `moved`: what has become
    of keys of earlier versions.
    """
    problems = error.errors(include_url=False)
    # A misspelt key is reported twice, as unknown and as missing: the unknown one says more. So does what is
    # wrong in a list beside that the list is then too short
    problems.sort(key=lambda p: {"extra_forbidden": 0, "missing": 2, "too_short": 3}.get(p["type"], 1))
    first, more = problems[0], len(problems) - 1
    key, value = ".".join(map(str, first["loc"])), show(first["input"])
    if first["type"] == "extra_forbidden":
        line = f"unknown key {key} (value {value}); {_way_out(key, known, moved)}"
    elif first["type"] == "missing":
        line = f"missing key {key}: it has no default; presets/ holds complete files"
    elif first["type"] == "value_error":  # of our own validators, which name the key
        reason = first.get("ctx", {})["error"]
        line = f"{key}.{reason}" if key else str(reason)
    elif first["type"] == "union_tag_invalid":  # of a registry: the name of an encoder
        facts = first.get("ctx", {})
        allowed = facts["expected_tags"].replace("'", "")
        line = f"{key} = {facts['tag']!r}: allowed: {allowed}"
    else:
        message = first["msg"].removeprefix("Input should be ").replace("'", "")
        message = message.replace("a valid tuple", "a list")  # as YAML calls it
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
