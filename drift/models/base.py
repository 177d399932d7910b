"""Models as folders in diffusers' format: `config.json`, and safetensors files for each copy of the weights.

Saving is diffusers'. Loading is stricter: diffusers fills parameters that a file lacks with random numbers
and ignores unknown keys.
"""

import inspect
import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from drift.runtime.errors import UserError
from drift.runtime.files import without_wrappers
from drift.runtime.hub import download

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_COPY = re.compile(r"diffusion_pytorch_model\.?(.*?)(?:-\d{5}-of-\d{5})?\.safetensors")
_FORMER_COPY = re.compile(r"(?:model\.?|(?=ema_))(.*)\.safetensors")  # as drift named them at first
_FORMER_CLASSES = {"PriorMAE": "SinkhornMAE"}
_DAMAGED = (UserError, SafetensorError, OSError, RuntimeError, TypeError, ValueError, AttributeError)
_WAY_OUT = "make the folder again, or fetch it anew (dvc pull)"

Model = TypeVar("Model", bound=ModelMixin)


class PretrainedModel(ModelMixin, ConfigMixin):
    """A network with diffusers' `save_pretrained`; a subclass has its sizes by `register_to_config`.

    Its tensors are parameters or persistent buffers: loading skips the initialisation, which sets others.
    """

    config_name = CONFIG_FILE

    @classmethod
    def family(cls) -> list[type[Self]]:
        """The classes that `from_pretrained` may return."""
        return [cls]

    def save_pretrained(self, save_directory: str | Path, variant: str | None = None, **options: Any) -> None:
        """Write config and weights into a folder, with diffusers' `options`."""
        super().save_pretrained(save_directory, variant=variant, **options)
        share_weights(Path(save_directory))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        variant: str | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        **hub: Any,
    ) -> Self:
        """The model in a folder or on the Hugging Face hub, on the CPU, in evaluation mode.

        Args:
            source: a folder; a `str` that names none is a hub id.
            variant: another copy of the weights, such as `ema_09999`; dots in it do not count.
            revision: branch, tag or commit on the hub.
            torch_dtype: of the weights.
            hub: options of huggingface_hub's `snapshot_download`, such as `token`.

        Raises `UserError` if a file is missing or damaged, or if config and weights do not fit together.
        """
        folder = model_folder(source, revision, variant, **hub)
        found, sizes = cls._read_config(folder / CONFIG_FILE)
        model = load_model(lambda: found(**sizes), folder, variant)
        nn.Module.to(model, torch_dtype)  # diffusers' own `to` warns of every cast
        return model

    @classmethod
    def _read_config(cls, path: Path) -> tuple[type[Self], dict[str, Any]]:
        """The class that a config names, and its sizes."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or f"not JSON: {error}"
            raise UserError(f"{path}: missing or damaged ({reason}); {_WAY_OUT}") from None
        values = values if isinstance(values, dict) else {}
        former = str(values.get("model", ""))  # where the first version wrote the name of the class
        name = values.get("_class_name", _FORMER_CLASSES.get(former, former))
        found = next((each for each in cls.family() if each.__name__ == name), None)
        if found is None:
            raise UserError(f"{path}: not the config of a {cls.__name__}; name the folder of one")
        known = inspect.signature(found).parameters.keys()
        unknown = [] if former else sorted(key for key in values.keys() - known if key[0] != "_")
        for key in unknown + sorted(known - values.keys()):
            problem = f"the key {key} is missing" if key in known else f"unknown key {key}"
            raise UserError(f"{path}: {problem}; a {found.__name__} has {', '.join(known)}")
        return found, {k: tuple(v) if isinstance(v := values[k], list) else v for k in known}


def share_weights(folder: Path) -> None:
    """Give the weights below `folder` the permissions of the configs beside them.

    safetensors creates its files for their owner alone, whatever the umask.
    """
    for weights in folder.rglob("*.safetensors"):
        with suppress(OSError):  # some filesystems store no permissions
            shutil.copymode(weights.with_name(CONFIG_FILE), weights)


def model_folder(source: str | Path, revision: str | None, variant: str | None, **hub: Any) -> Path:
    """The local folder of a model, downloaded if `source` is a hub id; `UserError` if there is none."""
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path):
        raise UserError(f"{source}: there is no such folder; name one that a stage or save_pretrained wrote")
    weights = f"diffusion_pytorch_model.*{variant}*" if variant else "diffusion_pytorch_model[.-][s0]*"
    what = f"{source}: is not a local folder, and"
    way_out = f"put its {CONFIG_FILE} and {WEIGHTS_FILE} into a folder and name that"
    return download(source, revision, [CONFIG_FILE, weights], what=what, way_out=way_out, **hub)


def weights_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each copy of the weights in `folder`, by its variant without dots, the main one by ""."""
    found: dict[str, list[Path]] = {}
    for pattern in (_FORMER_COPY, _COPY):  # the latter wins where a folder holds both
        copies: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            if match := pattern.fullmatch(path.name):
                copies.setdefault(match[1].replace(".", ""), []).append(path)
        found |= copies
    return found


def model_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Config and weights of a model, in this order; `UserError` if there are no such weights."""
    copies = weights_files(folder)
    name = "" if variant in (None, "model") else variant.replace(".", "")
    if name not in copies:
        wanted = WEIGHTS_FILE.replace(".", f".{name}.") if name else WEIGHTS_FILE
        there = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))) or "none"
        raise UserError(f"{folder / wanted}: is missing; weights in that folder: {there}")
    return [folder / CONFIG_FILE, *copies[name]]


def load_model(
    build: Callable[[], Model],
    folder: Path,
    variant: str | None = None,
    *,
    canonical: Callable[[str], str] = str,
    on_meta: bool = True,
) -> Model:
    """The model that `build` makes, with the weights in `folder`, on the CPU and in evaluation mode.

    Names of weights that `canonical` maps to the same are the same. `on_meta` spares the initialisation, for
    a model that keeps none of it.

    Raises `UserError` if they are missing or damaged, or are not exactly those of the model.
    """
    config, *files = model_files(folder, variant)
    where, what = config, "damaged"
    try:
        model = uninitialized(build) if on_meta else build()
        where = files[0]
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        what = f"does not fit {CONFIG_FILE}"
        own = {canonical(name): name for name in model.state_dict()}
        ignored = model._keys_to_ignore_on_load_unexpected or []
        weights = OrderedDict(
            (own.get(canonical(name), name), tensor)
            for name, tensor in without_wrappers(weights).items()
            if not any(re.search(pattern, name) for pattern in ignored)
        )
        model._fix_state_dict_keys_on_load(weights)  # names of older versions of diffusers
        model.load_state_dict(weights)
    except _DAMAGED as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: {what} ({reason}); {_WAY_OUT}") from None
    return model.eval()


def uninitialized(build: Callable[[], Model]) -> Model:
    """The model that `build` makes, on the CPU, with tensors that are still to be filled."""
    with torch.device("meta"):
        model = build()
    names = model.state_dict().keys()
    assert all(name in names for name, _ in model.named_buffers()), "a non-persistent buffer"
    return model.to_empty(device="cpu")


def require_at_least(minimum: int, **sizes: Any) -> None:
    """Raises `UserError` if one of `sizes` is no whole number of at least `minimum`, or no list of such."""
    for name, value in sizes.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if not numbers or any(type(number) is not int or number < minimum for number in numbers):
            raise UserError(f"{name} is {value!r}: give whole numbers of at least {minimum}")
