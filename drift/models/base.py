"""Models on disk: a folder with `config.json` and one safetensors file per copy of the weights."""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from drift.runtime.errors import UserError
from drift.runtime.files import atomic_write, without_wrappers, write_json

CONFIG_FILE = "config.json"
_DIGEST = "sha256"
_WAY_OUT = "make the folder again, or fetch it anew (dvc pull)"


class PretrainedModel(nn.Module):
    """A network that is built from a frozen dataclass, its config, and can be saved and loaded.

    A subclass names the dataclass in `config_class` and takes one of it as its only argument. All its
    tensors are parameters or persistent buffers: loading skips the initialisation, so others would be lost.
    """

    config_class: ClassVar[type]

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def save_pretrained(self, folder: str | Path, weights: str = "model") -> None:
        """Write `config.json` and `<weights>.safetensors` into `folder`, which is made if it is missing.

        Several copies of the weights, such as those of several EMA decays, share a folder under different
        names. Equal models give equal bytes. The file holds a SHA-256 of its tensors, so that a changed bit
        is found by `from_pretrained`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_FILE, {"model": type(self).__name__, **dataclasses.asdict(self.config)})
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        with atomic_write(folder / f"{weights}.safetensors") as file:
            # One key: safetensors writes several in an order that changes from call to call
            file.write(save(tensors, metadata={_DIGEST: _digest(tensors)}))

    @classmethod
    def from_pretrained(cls, folder: str | Path, weights: str = "model") -> Self:
        """The model in `folder` with the weights named `weights`, on the CPU, in evaluation mode.

        Raises `UserError` if a file is missing or damaged, or if config and weights do not fit together.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(
                f"{folder}: there is no such folder; name the folder of a {cls.__name__}, which a stage or "
                "save_pretrained has written"
            )
        found, config = _read_config(folder / CONFIG_FILE, cls)
        model = found.uninitialized(config)
        model.load_state_dict(_read_weights(folder / f"{weights}.safetensors", model.state_dict()))
        return model.eval()

    @classmethod
    def variants(cls) -> dict[str, type[Self]]:
        """The classes that `from_pretrained` may give, by the name that their `config.json` has."""
        return {cls.__name__: cls}

    @classmethod
    def uninitialized(cls, config: Any) -> Self:
        """A model on the CPU whose tensors are still to be filled; saves the time of drawing them."""
        with torch.device("meta"):
            model = cls(config)
        names = model.state_dict().keys()
        assert all(name in names for name, _ in model.named_buffers()), "a non-persistent buffer"
        return model.to_empty(device="cpu")


def make_config(config_class: type, values: Mapping[str, Any]) -> Any:
    """A config dataclass from values as JSON holds them.

    Raises `UserError` naming the first key that is unknown, missing or of another type than its field.
    """
    hints = typing.get_type_hints(config_class)
    for key in sorted(values.keys() | hints.keys()):
        if key not in hints:
            raise UserError(f"unknown key {key}; allowed: {', '.join(hints)}")
        if key not in values:
            raise UserError(f"the key {key} is missing; wanted: {', '.join(hints)}")
        if not _fits(values[key], hints[key]):
            wanted = getattr(hints[key], "__name__", str(hints[key]))
            raise UserError(f"{key} is {values[key]!r} where {wanted} is wanted")
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def require_at_least(minimum: int, config: Any, *names: str) -> None:
    """Raises `UserError` if one of the named fields of `config` is smaller than `minimum`."""
    for name in names:
        if getattr(config, name) < minimum:
            raise UserError(f"{name} is {getattr(config, name)}: give a number of at least {minimum}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of the type that a dataclass field declares."""
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    return type(value) in ((int, float) if hint is float else (hint,))


def _read_config(path: Path, cls: type[PretrainedModel]) -> tuple[type[PretrainedModel], Any]:
    """The variant of `cls` that a config is of, and the config."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_WAY_OUT}") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); {_WAY_OUT}") from None
    found = cls.variants().get(values.pop("model", None)) if isinstance(values, dict) else None
    if found is None:
        raise UserError(f"{path}: not the config of a {cls.__name__}; name the folder of one")
    try:
        return found, make_config(found.config_class, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_weights(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            announced = (file.metadata() or {}).get(_DIGEST)  # files of others have none
    except FileNotFoundError:
        there = ", ".join(sorted(other.stem for other in path.parent.glob("*.safetensors"))) or "none"
        raise UserError(f"{path}: is missing; weights in that folder: {there}") from None
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged ({reason}); {_WAY_OUT}") from None
    if announced is not None and announced != _digest(tensors):
        raise UserError(f"{path}: damaged (the weights are not those that were written); {_WAY_OUT}")
    tensors = without_wrappers(tensors)
    for name in sorted(tensors.keys() | expected.keys()):
        found, wanted = (_shape(side.get(name)) for side in (tensors, expected))
        if found != wanted:
            raise UserError(
                f"{path}: parameter {name} is {found} where {CONFIG_FILE} makes it {wanted}: they are not of "
                f"one model; {_WAY_OUT}"
            )
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of contiguous CPU tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(list(tensor.shape))
