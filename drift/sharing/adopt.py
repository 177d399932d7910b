"""Results that were handed on as plain folders: fetched, checked, and put where a stage's output belongs.

`fetch_source` copies from a folder of this machine or of an rclone remote; `adopt_latents` makes the files
that the prior's users exchange the output of `encode`; `commit` lets DVC take that for the stage's result.
`adopt_mae` makes a checkpoint of theirs an encoder, and `use_encoder` and `reproduce` the output of `mae`.
"""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from drift.autoencoders.kl import CONFIG_FILE, known_scaling_factor
from drift.data.latents import LatentStore, file_facts, latent_files
from drift.data.views import VIEW_OPTIONS
from drift.interop.sinkhorn_paper import import_sinkhorn_mae
from drift.models.sinkhorn_mae import SinkhornMAE
from drift.runtime.errors import UserError, one_of
from drift.runtime.files import atomic_write, check_output, check_writable, replace_folder, write_json
from drift.runtime.signals import when_parent_ends
from drift.runtime.work import SETTINGS_FILE, work_root
from drift.settings import Settings, output_around
from drift.sharing.remotes import check_remote, find_rclone
from drift.training.inputs import check_latents

CHECKPOINT = "ckpt_final.pt"
LATENT_FILES = ("*_latents.npy", "*_labels.npy", "*_meta.json")
_BLOCK = 32 * 2**20  # bytes read at once
_STD_RANGE = (0.5, 1.5)  # of latents, which are scaled to a standard deviation near 1
_OF_THE_STORE = "rerun encode (dvc repro) or fetch it (dvc pull)"
_FETCH_AGAIN = "copy the files again, or ask whoever made them"


def fetch_source(source: str, into: str | Path, include: Sequence[str] = ()) -> Path:
    """Copy a folder or a file into the folder `into`, which is made; returns `into`.

    `source` is a path of this machine or NAME:PATH of an rclone remote. `include` are patterns of file names,
    by default all files. What a fetch that was cut off has copied whole is not copied again. Progress goes to
    stdout, rclone's to stderr.

    Raises `UserError` if there is nothing to be copied, or copying fails.
    """
    into = Path(into)
    check_writable(into)
    local = Path(source).expanduser()
    if local.exists():
        _fetch_local(local, into, include)
    elif re.match(r"[^/:]+:", source):
        _fetch_rclone(source, into, include)
    else:
        raise UserError(f"{source}: there is no such folder; give one, or NAME:PATH of an rclone remote")
    return into


def adopt_latents(
    source: str, view: str, settings: Settings, out: str | Path, *, force: bool = False
) -> list[str]:
    """Fetch latents from `source`, check them and put them at `out`; the lines to tell about them.

    `source` is what `fetch_source` takes and holds `<split>_latents.npy` `[N, C, H, W]` float16,
    `<split>_labels.npy` `[N]` int64 and `<split>_meta.json` of the split train and of any others. `view` is
    `center` or `augmented`. The meta files are completed by what follows from `settings` and the files.
    With `force` an `out` that exists is replaced; it is whole at any time.

    Raises `UserError`, naming the file, if one is missing, damaged, not finite or of another shape than the
    others, or contradicts the settings.
    """
    out = Path(out)
    if out.exists() and not force:
        raise UserError(f"{out}: exists already; --force replaces it")
    check_output(out)
    key = hashlib.sha256(f"{view} {source}".encode()).hexdigest()[:16]
    folder = fetch_source(source, work_root() / "adopt" / key, LATENT_FILES)
    try:
        noticed = _check_and_complete(folder, source, view, settings)
    except UserError:
        shutil.rmtree(folder)  # it may be refused for what happened on the way: fetched anew the next time
        raise
    replace_folder(folder, out)
    return noticed


def adopt_mae(source: str, destination: str | Path, *, force: bool = False) -> SinkhornMAE:
    """Fetch an MAE checkpoint of the prior and write it as an encoder of ours into `destination`.

    `source` is what `fetch_source` takes: the file `ckpt_final.pt`, or the folder of a run that has it in
    `checkpoints/`. With `force` a `destination` that exists is replaced; it is whole at any time.

    Raises `UserError` as `fetch_source` and `import_sinkhorn_mae` do.
    """
    destination = Path(destination)
    if output := output_around(destination):
        raise UserError(f"{destination}: in {output}, which a stage writes; name another folder")
    if destination.exists() and not force:
        raise UserError(f"{destination}: exists already; --force replaces it")
    check_output(destination)
    if not source.endswith(".pt"):
        source = f"{source.rstrip('/')}/checkpoints/{CHECKPOINT}"
    key = hashlib.sha256(f"mae {source}".encode()).hexdigest()[:16]
    folder = fetch_source(source, work_root() / "adopt" / key)
    fresh = folder / "encoder"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        model = import_sinkhorn_mae(folder / Path(source).name, fresh)
    except UserError as error:
        shutil.rmtree(folder)  # it may be refused for what happened on the way: fetched anew the next time
        raise UserError(str(error).replace(str(folder / Path(source).name), source)) from None
    replace_folder(fresh, destination)
    shutil.rmtree(folder)
    return model


def use_encoder(folder: Path, params: Path, latents: Path) -> dict[str, Any]:
    """Write into the settings file `params` that the stage mae takes the encoder in `folder`.

    If the view that it trains on has not been encoded into `latents/<view>`, it is not encoded for an encoder
    that is not trained either. Everything else in the file stays, its comments too. Returns what was changed,
    by its key.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    content = yaml.load(params)
    changed: dict[str, Any] = {"mae.source": str(folder)}
    content["mae"]["source"] = str(folder)
    if not (latents / content["mae"]["view"]).exists():
        content["mae"]["view"] = changed["mae.view"] = "center"
        content["views"][:] = changed["views"] = ["center"]
    with atomic_write(params) as file:
        yaml.dump(content, file)
    return changed


def reproduce(stage: str) -> None:
    """Run one stage of the pipeline and none before it; raises `UserError` if it fails."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dvc", "repro", "--single-item", stage], preexec_fn=when_parent_ends
    )
    if done.returncode:
        raise UserError(
            f"dvc repro ended with code {done.returncode}; the encoder and the settings are in place, so see "
            f"to its complaint above, then: dvc repro {stage}"
        )


def commit(stage: str) -> None:
    """Let DVC take what lies at a stage's outputs for the stage's result (`dvc commit`).

    Raises `UserError` if DVC refuses.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dvc", "commit", "-f", stage],
        preexec_fn=when_parent_ends,
    )
    if done.returncode:
        raise UserError(
            f"dvc commit ended with code {done.returncode}; the files are in place, so see to its complaint "
            f"above, then: dvc commit -f {stage}"
        )


def _fetch_local(source: Path, into: Path, include: Sequence[str]) -> None:
    if source.is_dir():
        patterns = include or ("**/*",)
        found = {path: path.relative_to(source) for pattern in patterns for path in source.glob(pattern)}
    else:
        found = {source: Path(source.name)}
    files = {path: into / name for path, name in sorted(found.items()) if path.is_file()}
    if not files:
        raise UserError(f"{source}: holds nothing of {', '.join(include) or 'any kind'}; name another folder")
    todo = {path: copy for path, copy in files.items() if not _same(path, copy)}
    needed, free = sum(path.stat().st_size for path in todo), shutil.disk_usage(into).free
    if needed > free:
        raise UserError(
            f"{into}: {needed / 2**30:.1f} GiB are to be copied there, and {free / 2**30:.1f} GiB are free; "
            "make room or move the work folder (DRIFT_WORK_DIR)"
        )
    for path, copy in files.items():
        if path in todo:
            print(f"copying {path} ({path.stat().st_size / 2**20:.1f} MiB)", flush=True)
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial = copy.with_name(f".{copy.name}.part")
            try:
                shutil.copyfile(path, partial)
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be copied ({error.strerror}); see to it, run again"
                ) from None
            shutil.copystat(path, partial)
            os.chmod(partial, 0o644)
            os.replace(partial, copy)


def _same(path: Path, copy: Path) -> bool:
    if not copy.exists():
        return False
    here, there = copy.stat(), path.stat()
    return (here.st_size, here.st_mtime_ns) == (there.st_size, there.st_mtime_ns)


def _fetch_rclone(source: str, into: Path, include: Sequence[str]) -> None:
    rclone = find_rclone()
    check_remote(rclone, source, subprocess.run)
    filters = [argument for pattern in include for argument in ("--include", f"/{pattern}")]
    arguments = ["copy", "--stats", "10s", "--stats-log-level", "NOTICE", "--stats-one-line"]
    if sys.stderr.isatty():
        arguments = ["copy", "--progress"]
    print(f"copying {source} by rclone", flush=True)
    done = subprocess.run(
        [rclone, *arguments, "--ask-password=false", *filters, source, str(into)],
        preexec_fn=when_parent_ends,
    )
    if done.returncode:
        raise UserError(
            f"{source}: rclone copy ended with code {done.returncode}, as it tells above; correct the path, "
            "or run again: what was copied whole is not copied again"
        )
    if not any(into.iterdir()):
        raise UserError(f"{source}: holds nothing of {', '.join(include) or 'any kind'}; name another folder")


def _check_and_complete(folder: Path, source: str, view: str, settings: Settings) -> list[str]:
    splits = sorted(path.name.removesuffix("_latents.npy") for path in folder.glob("*_latents.npy"))
    if "train" not in splits:
        raise UserError(f"{source}: holds no train_latents.npy; name the folder of the latents")
    for path in folder.iterdir():  # of another fetch, or half of a pair
        if not any(path in latent_files(folder, split) for split in splits):
            path.unlink()
    noticed, adopted = [], {}
    for split in splits:
        try:
            said, adopted[split] = _check_split(folder, split, view, settings)
        except UserError as error:
            # The store tells how to make the project's own files anew
            reason = str(error).replace(_OF_THE_STORE, _FETCH_AGAIN)
            raise UserError(reason.replace(str(folder), source.rstrip("/"))) from None
        noticed += [f"{split}: {line}" for line in said]
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    with atomic_write(folder / SETTINGS_FILE) as file:
        yaml.dump({"stage": "encode", "adopted": {"source": source, "view": view, "splits": adopted}}, file)
    return noticed


def _check_split(folder: Path, split: str, view: str, settings: Settings) -> tuple[list[str], dict[str, Any]]:
    """What was noticed, and which keys of the meta file were stated and which are taken from the settings."""
    store = LatentStore.open(folder, split)
    latents_path, labels_path, meta_path = latent_files(folder, split)
    stated = dict(store.meta)
    wanted = _expected(view, settings)
    check_latents(store, settings, view)
    for key, value in wanted.items():
        if key in stated and not _agree(stated[key], value):
            raise UserError(
                f"{meta_path}: {key} is {json.dumps(stated[key])}, by params.yaml it is {json.dumps(value)}; "
                "adopt others, or correct params.yaml"
            )
    if int(store.labels.max()) >= settings.data.classes:
        raise UserError(
            f"{labels_path}: labels {store.labels.min()} to {store.labels.max()} are not all in "
            f"0 to {settings.data.classes - 1} (data.classes); adopt others, or correct data.classes"
        )
    shape = _latent_shape(settings)
    if shape is not None and store.shape[1:] != shape:
        raise UserError(
            f"{latents_path}: holds latents {list(store.shape[1:])}, but encode.vae makes {list(shape)} of "
            f"images of {settings.data.image_size} pixels; adopt others, or correct params.yaml"
        )
    facts = file_facts(folder, split)
    for key in ("shape", "dtype", "sha256"):
        if key in stated and stated[key] != facts[key]:
            raise UserError(
                f"{meta_path}: {key} is {json.dumps(stated[key])}, but the files beside it have "
                f"{json.dumps(facts[key])}; {_FETCH_AGAIN}"
            )
    store.per_image  # noqa: B018  raises UserError where the meta file's images are not these rows
    std = _standard_deviation(store, latents_path)
    noticed = [f"{len(store)} latents {list(store.shape[1:])}, standard deviation {std:.3f}"]
    if not _STD_RANGE[0] <= std <= _STD_RANGE[1]:
        scale = wanted.get("scaling_factor", 1.0)
        unscaled = _STD_RANGE[0] <= std * scale <= _STD_RANGE[1]
        noticed.append(
            "warning: the standard deviation should be near 1"
            + (f"; multiplied by the VAE's scale, {scale}, it would be" if unscaled else "")
        )
    absent = np.setdiff1d(np.arange(settings.data.classes), store.labels)
    if len(absent):
        noticed.append(f"warning: no latents of {len(absent)} classes, such as {absent[0]}")
    key = "crops" if view == "augmented" else "mirror"
    if key not in stated and wanted[key] > 1 - (key == "mirror"):
        noticed.append(
            f"warning: {meta_path.name} does not state {key} (encode.{key} is {json.dumps(wanted[key])}): "
            "every row will count as an image of its own"
        )
    # What the files do not state and cannot show is taken from the settings where the settings decide it
    assumed = {key: value for key, value in wanted.items() if key in _ASSUMED and key not in stated}
    write_json(meta_path, {**assumed, **stated, **facts})
    return noticed, {"stated": sorted(stated), "from_settings": sorted(assumed)}


_ASSUMED = {"view", "image_size", "vae", "scaling_factor", "num_classes"}


def _expected(view: str, settings: Settings) -> dict[str, Any]:
    """Keys of a meta file that the settings decide; `drift.training.encode` writes the same ones."""
    data, encode = settings.data, settings.encode
    own = VIEW_OPTIONS[one_of("view", view, *VIEW_OPTIONS)]
    expected = {
        "view": view,
        "image_size": data.image_size,
        "num_classes": data.classes,
        "vae": encode.vae,
        "posterior": encode.posterior,
        **{key: getattr(encode, key) for key in own},
    }
    scale = known_scaling_factor(encode.vae, encode.vae_revision)
    return expected if scale is None else {**expected, "scaling_factor": scale}


def _latent_shape(settings: Settings) -> tuple[int, int, int] | None:
    """(C, H, W) of the latents that the settings ask for; None where the VAE's config is not at hand."""
    from huggingface_hub import try_to_load_from_cache

    encode = settings.encode
    path = Path(encode.vae) / CONFIG_FILE
    try:
        if not path.parent.is_dir():
            cached = try_to_load_from_cache(encode.vae, CONFIG_FILE, revision=encode.vae_revision)
            if not isinstance(cached, str):
                return None
            path = Path(cached)
        config = json.loads(path.read_bytes())
        side = settings.data.image_size // 2 ** (len(config["block_out_channels"]) - 1)
        return config["latent_channels"], side, side
    except (OSError, ValueError, KeyError):  # also for a path that cannot be an id on the hub
        return None


def _agree(stated: Any, wanted: Any) -> bool:
    """As JSON has them; floats may have been rounded."""
    if isinstance(wanted, list | tuple):
        return isinstance(stated, list) and len(stated) == len(wanted) and all(map(_agree, stated, wanted))
    if isinstance(wanted, float):
        return isinstance(stated, int | float) and math.isclose(stated, wanted, rel_tol=1e-6)
    return stated == wanted


def _standard_deviation(store: LatentStore, path: Path) -> float:
    """Over all values, read block after block; raises `UserError` for a value that is not finite."""
    rows = max(1, _BLOCK // store.latents.strides[0])
    total, squares = 0.0, 0.0
    for start in range(0, len(store), rows):
        indices = np.arange(start, min(start + rows, len(store)))
        block = store.read(indices).numpy()
        finite = np.isfinite(block).all(axis=(1, 2, 3))
        if not finite.all():
            raise UserError(
                f"{path}: row {indices[~finite][0]} holds a value that is not finite; {_FETCH_AGAIN}"
            )
        values = block.astype(np.float64)
        total += values.sum()
        squares += np.square(values).sum()
    count = math.prod(store.shape)
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2))
