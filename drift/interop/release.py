"""The authors' release (JAX) as models of ours.

A folder of it (`Goodeat/drifting` on the Hugging Face hub) holds `metadata.json` and `ema_params.msgpack`, a
tree of arrays in Flax's encoding. Nothing in them is executed. Every array must find its place in a model of
the size that the metadata give, with the same shape, and every place its array.
"""

import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from torch import Tensor, nn

from drift.models.base import Model, uninitialized
from drift.models.generator import Generator
from drift.models.mae import LatentMAE
from drift.runtime.errors import UserError
from drift.runtime.files import check_writable
from drift.runtime.hub import download

HUB_ID = "Goodeat/drifting"
RELEASES = {
    **dict.fromkeys(("latent_L_sota", "latent_B_sota", "pixel_L_sota", "pixel_B_sota", "ablation"), "gen"),
    **dict.fromkeys(("mae_latent_640", "mae_latent_256", "mae_pixel_640"), "mae"),
}
"""Names of the release's models on the hub, and of which kind they are."""

_WAY_OUT = "get a fresh copy"

# Keys of the release's model_config by the names of ours, and those that change no number of a forward pass
# in float32. The rest must have the one value that ours knows.
_MAE_KEYS = {
    name: name
    for name in ("in_channels", "base_channels", "layers", "patch_size", "input_patch_size", "num_classes")
}
_MAE_IGNORED = {"dropout_prob", "use_bf16"}
_SAME_IN_GENERATORS = (
    "in_channels", "input_size", "num_classes", "hidden_size", "depth", "num_heads", "patch_size", "mlp_ratio"
)  # fmt: skip
_GENERATOR_KEYS = {
    **{name: name for name in _SAME_IN_GENERATORS},
    "n_cls_tokens": "context_tokens",
    "noise_coords": "style_codebooks",
    "noise_classes": "style_entries",
}
_GENERATOR_IGNORED = {"use_bf16", "attn_fp32", "use_remat"}
# These may be absent: with another value there would be other arrays, or arrays of other shapes
_SHOWN_BY_ARRAYS = {"cond_dim", "out_channels", "use_qknorm", "use_swiglu", "use_rmsnorm"}

# The release's words for parts of our parameters' names, put in their place one after the other
_MAE_WORDS = {
    "encoder.stem.conv": "encoder.conv1",
    "encoder.stem.norm": "encoder.gn1",
    **{f"stage_norms.{s}": f"layer{s + 1}_norm" for s in range(4)},
    **{f"stages.{s}.": f"stages_{s}.layers_" for s in range(4)},
    "shortcut.0": "proj_conv",
    "shortcut.1": "proj_gn",
    **{f"{up}.norm": f"{up}.concat_norm_fn" for up in ("up43", "up32", "up21", "up10")},
    ".norm": ".gn",
    "classifier": "fc",
}
_GENERATOR_WORDS = {
    "class_embedding": "Embed_0",
    "omega_embedder.mlp.0": "TimestepEmbedder_0.TorchLinear_0.Dense_0",
    "omega_embedder.mlp.2": "TimestepEmbedder_0.TorchLinear_1.Dense_0",
    "omega_embedder.norm": "RMSNorm_0",
    "patch_embedding": "LightningDiT_0.TorchLinear_0.Dense_0",
    "context_projection": "LightningDiT_0.TorchLinear_1.Dense_0",
    "position_embedding": "LightningDiT_0.pos_embed",
    "context_embedding": "LightningDiT_0.cls_embed",
    "final.norm": "LightningDiT_0.FinalLayer_0.RMSNorm_0",
    "final.modulation": "LightningDiT_0.FinalLayer_0.TorchLinear_0.Dense_0",
    "final.output": "LightningDiT_0.FinalLayer_0.TorchLinear_1.Dense_0",
    "blocks.": "LightningDiT_0.blocks_",
    "norm1": "RMSNorm_0",
    "norm2": "RMSNorm_1",
    "modulation": "TorchLinear_0.Dense_0",
    "attention.qkv": "Attention_0.TorchLinear_0.Dense_0",
    "attention.output": "Attention_0.TorchLinear_1.Dense_0",
    "attention.": "Attention_0.",
    "mlp.gate": "SwiGLUFFN_0.TorchLinear_0.Dense_0",
    "mlp.value": "SwiGLUFFN_0.TorchLinear_1.Dense_0",
    "mlp.output": "SwiGLUFFN_0.TorchLinear_2.Dense_0",
}


def import_release(source: str | Path, destination: str | Path) -> LatentMAE | Generator:
    """Write the model in the release's folder `source` as a folder of ours, and return it.

    Both files are looked for in `source` and in `source/params_ema`. Raises `UserError` if they are missing,
    damaged, or do not fit together, or if `destination` cannot be written.
    """
    source = Path(source)
    metadata_path, params_path = _find(source, "metadata.json"), _find(source, "ema_params.msgpack")
    kind, model_config = _read_metadata(metadata_path)
    params = read_flax_msgpack(params_path)
    try:
        model = {"mae": convert_mae, "gen": convert_generator}[kind](params, model_config)
    except UserError as error:
        raise UserError(f"{params_path.parent}: {error}") from None
    check_writable(destination)  # makes it, so not before there is something to write
    model.save_pretrained(destination)
    return model


def download_release(name: str, revision: str | None = None) -> Path:
    """The folder of the release's model `name` (one of `RELEASES`), downloaded if the hub's cache lacks it.

    Raises `UserError` if it cannot be had.
    """
    folder = f"models/{RELEASES[name]}/jax/{name}"
    root = download(
        HUB_ID,
        revision,
        [f"{folder}/*"],
        what=f"{name}: {HUB_ID}",
        way_out=f"get {folder}/ of it where there is a network, and name the local folder instead",
    )
    return root / folder


def convert_mae(params: Mapping[str, np.ndarray], model_config: Mapping[str, Any]) -> LatentMAE:
    """A LatentMAE in evaluation mode from the release's `model_config` and its arrays by path.

    Raises `UserError` naming the first key or array that does not fit.
    """
    # The release's trainer leaves the number of classes to the data; the head has a bias for each
    config = {"num_classes": len(params.get("fc/bias", ())), **model_config}
    values = translate(config, _MAE_KEYS, {}, _MAE_IGNORED)
    model = uninitialized(lambda: LatentMAE(**values, norm_groups=32))  # fixed in the release
    return fill(model, _views(model, _MAE_WORDS), params)


def convert_generator(params: Mapping[str, np.ndarray], model_config: Mapping[str, Any]) -> Generator:
    """A Generator in evaluation mode from the release's `model_config` and its arrays by path.

    Raises `UserError` naming the first key or array that does not fit.
    """
    required = {
        "cond_dim": model_config.get("hidden_size"),
        "out_channels": model_config.get("in_channels"),
        **dict.fromkeys(("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm"), True),
    }
    config = {"num_classes": len(params.get("Embed_0/embedding", ())), **model_config}
    values = translate(config, _GENERATOR_KEYS, required, _GENERATOR_IGNORED)
    model = uninitialized(lambda: Generator(**values))
    views = _views(model, _GENERATOR_WORDS)
    if model.style_embedder is not None:
        codebooks = views.pop("style_embedder/weight").split(model.style_entries)
        views |= {f"noise_embeds_{i}/embedding": codebook for i, codebook in enumerate(codebooks)}
    return fill(model, views, params)


def read_flax_msgpack(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of a file in Flax's encoding, by its path in the tree, words joined by `/`.

    bfloat16, which NumPy does not know, becomes float32. Raises `UserError` if the file is damaged.
    """
    try:
        with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return dict(_flatten(msgpack.unpackb(content, ext_hook=_decode_extension)))
    except (OSError, ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise UserError(f"{path}: damaged, or not Flax's msgpack ({error}); {_WAY_OUT}") from None


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / "params_ema" / name):
        if path.is_file():
            return path
    raise UserError(f"{folder / name}: is missing; name a folder of the release that has it")


def _read_metadata(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        kind, model_config = metadata["kind"], dict(metadata["model_config"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: damaged, or not the release's metadata ({reason}); {_WAY_OUT}") from None
    if kind not in ("gen", "mae"):
        raise UserError(f"{path}: kind is {kind!r}; only gen and mae can be imported")
    return kind, model_config


def translate(
    config: Mapping[str, Any],
    keys: Mapping[str, str],
    required: Mapping[str, Any],
    ignored: set[str],
    name: str = "model_config",
) -> dict[str, Any]:
    """The values of another code's config, called `name` there, by our names."""
    needed = keys.keys() | required.keys()
    for key in sorted(config.keys() - needed - ignored):
        raise UserError(f"{name} has the unknown key {key}, which may change the model; remove it if not")
    for key in sorted(needed - config.keys() - _SHOWN_BY_ARRAYS):
        raise UserError(f"{name} lacks the key {key}; add it with the value that the model was built with")
    for key, value in required.items():
        if config.get(key, value) != value:
            raise UserError(f"{name} has {key} = {config[key]!r}; only {value!r} can be imported")
    values = {ours: config[theirs] for theirs, ours in keys.items()}
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def rename(name: str, words: Mapping[str, str]) -> str:
    """`name` with each of the words that are keys replaced by its value, one after the other."""
    for ours, theirs in words.items():
        name = name.replace(ours, theirs)
    return name


def _views(model: nn.Module, words: Mapping[str, str]) -> dict[str, Tensor]:
    """The parameters of `model` by the release's paths, as views in the release's layout."""
    views = {}
    for prefix, layer in model.named_modules():
        for last, view in layer.named_parameters(recurse=False):
            match layer, last:
                case nn.Conv2d(), "weight":
                    last, view = "kernel", view.permute(2, 3, 1, 0)  # [kh, kw, in, out]
                case nn.Linear(), "weight":
                    last, view = "kernel", view.T  # [in, out]
                case nn.GroupNorm(), "weight":
                    last = "scale"
                case nn.Embedding(), "weight":
                    last = "embedding"
            path = rename(f"{prefix}.{last}".removeprefix("."), words)
            views[path.replace(".", "/")] = view
    return views


def fill(
    model: Model,
    views: Mapping[str, Tensor],
    params: Mapping[str, np.ndarray],
    config: str = "model_config",
) -> Model:
    """`model` in evaluation mode, its parameters filled with `params` through `views` of them, each once.

    Raises `UserError` naming the first array that does not fit what `config` of that code says.
    """
    assert sum(view.numel() for view in views.values()) == sum(p.numel() for p in model.parameters())
    for path in sorted(views.keys() | params.keys()):
        found, wanted = (list(side[path].shape) if path in side else "absent" for side in (params, views))
        if found != wanted:
            raise UserError(f"parameter {path} is {found} where {config} makes it {wanted}; {_WAY_OUT}")
        if (dtype := params[path].dtype).kind != "f":
            raise UserError(f"parameter {path} is {dtype}, not a floating point number; {_WAY_OUT}")
        np.copyto(views[path].detach().numpy(), params[path], casting="same_kind")
    return model.eval()


def _flatten(tree: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, np.ndarray):
        yield path, tree
    elif not isinstance(tree, dict):
        raise ValueError(f"{path or 'the whole'} is a {type(tree).__name__}, not an array")
    elif "__msgpack_chunked_array__" in tree:  # how Flax splits arrays over 1 GiB; its lists are dicts
        shape, chunks = ([part[str(i)] for i in range(len(part))] for part in (tree["shape"], tree["chunks"]))
        yield path, np.concatenate(chunks).reshape(shape)
    else:
        for word, subtree in tree.items():
            yield from _flatten(subtree, f"{path}/{word}" if path else word)


def _decode_extension(code: int, data: bytes) -> np.ndarray:
    """An array (Flax's extension type 1) or a NumPy scalar (3): packed shape, dtype name and bytes."""
    if code not in (1, 3):
        raise ValueError(f"unknown extension type {code}")
    shape, dtype, content = msgpack.unpackb(data)
    if dtype == "bfloat16":  # the upper half of a float32
        array = (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        array = np.frombuffer(content, dtype)
    return array.reshape(shape)
