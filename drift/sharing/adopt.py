"""Latents and encoders that were handed on as plain files: checked, and put where a stage's output belongs.

The Sinkhorn paper's code has them as `<split>_latents.npy`, `<split>_labels.npy`, `<split>_meta.json`, or as
a file per sample, and as `ckpt_final.pt`. They come from a folder of this machine, or from one of rclone's as
NAME:PATH.
"""

import hashlib
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from drift.data.datasets import open_images
from drift.data.latents import LatentStore, check_meta, file_facts, latent_files
from drift.data.views import VIEW_OPTIONS
from drift.interop import import_sinkhorn_mae
from drift.models import LatentMAE
from drift.runtime.errors import UserError, one_of
from drift.runtime.files import check_output, check_writable, remove, replace_folder, write_json
from drift.runtime.signals import when_parent_ends
from drift.runtime.work import SETTINGS_FILE, work_root
from drift.settings import Settings, load_settings, output_around
from drift.sharing.remotes import find_rclone
from drift.sharing.samples import gather_samples, has_samples
from drift.training.inputs import check_latents

CHECKPOINT = "ckpt_final.pt"
_STD_RANGE = (0.5, 1.5)  # latents are scaled to a standard deviation near 1
# What a meta file may leave out and the arrays do not show: taken from the settings
_ASSUMED = ("view", "image_size", "vae", "scaling_factor", "num_classes")


def adopt_latents(
    source: str,
    view: str,
    settings: Settings,
    out: str | Path,
    *,
    images: str | None = None,
    force: bool = False,
) -> list[str]:
    """Check the latents of a `view` in the folder `source` and put them at `out`; returns lines to print.

    The folder holds the split train and any others, or a file for each training image, of which `images` is
    the root (`data.root` by default). Meta files are completed from `settings` and the arrays. With `force`,
    an `out` that exists is replaced; it is whole at any time. Raises `UserError`, naming the file, if one is
    missing, damaged, not finite or of another shape, or contradicts the settings.
    """
    out = Path(out)
    _check_destination(out, force)
    files = "/*_{latents.npy,labels.npy,meta.json}"
    with _fetched(source, files) as (folder, transfer), _draft(out) as draft:
        if has_samples(folder):
            data, known = settings.data, settings.encode.autoencoder.known(settings.data.image_size)
            training = open_images(data.dataset, images or data.root, "train", data.classes)
            gather_samples(folder, training, draft, known and known.shape)
            folder, transfer = draft, lambda *_: None
        splits = sorted(path.name.removesuffix("_latents.npy") for path in folder.glob("*_latents.npy"))
        if "train" not in splits:
            raise UserError(
                f"{folder}: holds no train_latents.npy, and no 000000.npy either, nor in folders like 00000; "
                "name the folder of the latents"
            )
        found = {split: _check_split(folder, split, view, settings) for split in splits}
        for split, (_, meta, _) in found.items():
            write_json(latent_files(draft, split)[2], meta)
            for path in latent_files(folder, split)[:2]:
                try:
                    transfer(path, draft / path.name)
                except OSError as error:
                    reason = error.strerror
                    raise UserError(f"{path}: cannot be copied ({reason}); mend that, run again") from None
        origins = {split: origin for split, (_, _, origin) in found.items()}
        record = {"stage": "encode", "adopted": {"source": source, "view": view, "splits": origins}}
        (draft / SETTINGS_FILE).write_text(yaml.safe_dump(record, sort_keys=False), encoding="utf-8")
    return [f"{split}: {line}" for split, (remarks, _, _) in found.items() for line in remarks]


def adopt_mae(source: str, destination: str | Path, *, force: bool = False) -> LatentMAE:
    """Write an MAE of the Sinkhorn paper's code as an encoder of ours into `destination`.

    `source` is the checkpoint, or the folder of a run that has it in `checkpoints/`. With `force`, a
    `destination` that exists is replaced; it is whole at any time. Raises `UserError`.
    """
    destination = Path(destination)
    if output := output_around(destination):
        raise UserError(f"{destination}: in {output}, which a stage writes; name another folder")
    _check_destination(destination, force)
    if not source.endswith(".pt"):
        source = f"{source.rstrip('/')}/checkpoints/{CHECKPOINT}"
    with _fetched(source, f"/{Path(source).name}") as (file, _), _draft(destination) as draft:
        return import_sinkhorn_mae(file, draft)


def use_encoder(folder: Path, params: Path, latents: Path) -> dict[str, Any]:
    """Write into `params` that the stage mae takes the encoder in `folder`; returns the changes by key.

    The stage then trains nothing. If the view that it trains on is not in `latents` yet, encode need not make
    it. The rest of the file stays, its comments too.
    """
    from dvc.utils.serialize import modify_yaml

    changed: dict[str, Any] = {"mae.source": str(folder)}
    settings = load_settings(params)
    view = settings.drift.view  # which is needed in any case
    with modify_yaml(params) as content:
        content["mae"]["source"] = str(folder)
        if not (latents / settings.mae.view).exists():
            changed |= {"mae.view": view, "views": [view]}
            content["mae"]["view"], content["views"][:] = view, [view]  # in the list's own style
    return changed


def run_dvc(*arguments: str) -> None:
    """Run a DVC command on what was adopted; raises `UserError` with the way out if it fails."""
    command = [sys.executable, "-P", "-m", "dvc", *arguments]
    if code := subprocess.run(command, preexec_fn=when_parent_ends).returncode:
        raise UserError(
            f"dvc {arguments[0]} ended with code {code} (its reason is above); what was adopted is in place: "
            f"mend that, then dvc {' '.join(arguments)}"
        )


def _check_destination(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise UserError(f"{path}: exists already; --force replaces it")
    check_output(path)


@contextmanager
def _draft(destination: Path) -> Iterator[Path]:
    """A new folder that takes the place of `destination` at the end."""
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as folder:
        draft = Path(folder, "draft")
        draft.mkdir()
        yield draft
        replace_folder(draft, destination)


@contextmanager
def _fetched(source: str, pattern: str) -> Iterator[tuple[Path, Callable]]:
    """`source` on this machine, and how its files are taken: copied, or moved if rclone has brought them.

    rclone goes on with a copy that was cut off. A refused copy is removed, since it may have been damaged on
    the way; the refusal names `source`.
    """
    local = Path(source).expanduser()
    if local.exists():
        yield local, shutil.copyfile
        return
    if not re.match(r"[^/:]+:", source):
        raise UserError(f"{source}: is not there; name a folder, or NAME:PATH of an rclone remote")
    copy = work_root() / "adopt" / hashlib.sha256(source.encode()).hexdigest()[:16]
    check_writable(copy)
    options = ["--progress", "--ask-password=false", "--include", pattern]
    command = [find_rclone(), "copy", *options, source, str(copy)]
    print(f"copying {source} by rclone", flush=True)
    if code := subprocess.run(command, preexec_fn=when_parent_ends).returncode:
        raise UserError(
            f"{source}: rclone copy ended with code {code} (its reason is above); correct the path, or run "
            "again: what was copied whole is not copied again"
        )
    found = copy / Path(source).name if pattern == f"/{Path(source).name}" else copy
    try:
        yield found, shutil.move
    except UserError as error:
        remove(copy)
        raise UserError(str(error).replace(str(found), source.rstrip("/"))) from None
    remove(copy)


def _check_split(
    folder: Path, split: str, view: str, settings: Settings
) -> tuple[list[str], dict[str, Any], dict[str, list[str]]]:
    """Remarks, the complete meta file, and which of its keys were stated and which the settings gave."""
    try:
        store = LatentStore.open(folder, split)
        check_latents(store, settings, view)
        expected, facts = _expected(view, settings), file_facts(folder, split)
        check_meta(store, **expected)
        store.per_image  # noqa: B018  raises UserError where the meta file's images are not these rows
        std = _check_arrays(store, facts, settings)
    except UserError as error:  # the store advises to make the project's own files anew
        reason = str(error).partition("; ")[0]
        raise UserError(f"{reason}; copy the files again, or correct params.yaml") from None
    remarks = [f"{len(store)} latents {list(store.shape[1:])}, standard deviation {std:.3f}"]
    if settings.encode.autoencoder.needs_source and not _STD_RANGE[0] <= std <= _STD_RANGE[1]:
        remarks.append("warning: it should be near 1; drift inspect latents tells more")
    rows = "crops" if view == "augmented" else "mirror"
    if rows not in store.meta and int(expected[rows]) > (rows == "crops"):
        remarks.append(
            f"warning: the meta file does not state {rows}: every row counts as an image of its own"
        )
    assumed = {key: expected[key] for key in _ASSUMED if key in expected and key not in store.meta}
    origin = {"stated": sorted(store.meta), "from_settings": sorted(assumed)}
    return remarks, {**assumed, **store.meta, **facts}, origin


def _expected(view: str, settings: Settings) -> dict[str, Any]:
    """Keys of a meta file that follow from the settings; `drift.training.encode` writes the same ones."""
    data, encode = settings.data, settings.encode
    keys = VIEW_OPTIONS[one_of("view", view, *VIEW_OPTIONS)]
    expected = {"view": view, "image_size": data.image_size, "num_classes": data.classes}
    expected |= {"vae": encode.autoencoder.id, "posterior": encode.posterior_used}
    expected |= {key: getattr(encode, key) for key in keys}
    known = encode.autoencoder.known(data.image_size)
    return expected if known is None else {**expected, "scaling_factor": known.scaling_factor}


def _check_arrays(store: LatentStore, facts: dict[str, Any], settings: Settings) -> float:
    """Compare arrays, meta file and settings; the standard deviation of all values, which must be finite."""
    latents_path, labels_path, meta_path = latent_files(store.folder, store.split)
    for key, value in facts.items():
        if store.meta.get(key, value) != value:
            raise UserError(f"{meta_path}: {key} is {store.meta[key]}, but the files beside it have {value}")
    classes, largest = settings.data.classes, int(store.labels.max())
    if largest >= classes:
        raise UserError(f"{labels_path}: label {largest} is not below data.classes = {classes}")
    known = settings.encode.autoencoder.known(settings.data.image_size)
    if known is not None and known.shape != store.shape[1:]:
        raise UserError(
            f"{latents_path}: holds latents {store.shape[1:]}, but the autoencoder makes {known.shape}"
        )
    total, squares = 0.0, 0.0
    for rows in tqdm(store.blocks(), desc="checking", unit="block", disable=None):
        block = store.rows(rows).double().flatten(1)
        if len(bad := (~block.isfinite().all(1)).nonzero()):
            raise UserError(f"{latents_path}: row {rows[int(bad[0])]} holds a value that is not finite")
        total += block.sum().item()
        squares += block.square().sum().item()
    count = math.prod(store.shape)
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2))
