"""What inspections read: latents and VAE that belong together, and the images that were encoded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drift.autoencoders.kl import VAE
from drift.data.datasets import open_images
from drift.data.images import BadImage
from drift.data.latents import LatentStore, file_hashes, latent_files
from drift.data.views import VIEWS, center_view
from drift.runtime.errors import UserError
from drift.runtime.seeds import numpy_generator
from drift.settings import Settings
from drift.training.inputs import check_latents

WAY_OUT = "rerun the stage that made it (dvc repro) or fetch it (dvc pull)"
_META_TYPES = {
    "view": str,
    "num_classes": int,
    "class_names": list,
    "shape": list,
    "crops": int,
    "mirror": bool,
    "images": int,
    "skipped_images": dict,
    "images_sha256": str,
    "dataset_split": str,
    "sha256": dict,
    "vae_sha256": str,
}


def open_latents(folder: str | Path, settings: Settings, view: str | None) -> LatentStore:
    """The latents of a folder, unchanged since they were written, as far as their meta file tells."""
    latents_path, labels_path, meta_path = latent_files(folder)
    if not Path(folder).is_dir():
        raise UserError(
            f"{folder}: there is no such folder of latents; run encode (dvc repro) or name another"
        )
    _check_meta_types(meta_path)
    store = LatentStore.open(folder)
    meta = store.meta
    check_latents(store, settings, view or view_of(store) or "center")
    if "shape" in meta and meta["shape"] != list(store.shape):
        raise UserError(
            f"{meta_path}: shape is {meta['shape']}, but {latents_path.name} holds {list(store.shape)}; "
            f"{WAY_OUT}"
        )
    if "class_names" in meta and len(meta["class_names"]) != store.num_classes:
        raise UserError(
            f"{meta_path}: {len(meta['class_names'])} class_names for {store.num_classes} classes; {WAY_OUT}"
        )
    _ = store.per_image  # which complains about a number of images that does not fit
    if "sha256" in meta:
        found = file_hashes(folder)
        for name, path in (("latents", latents_path), ("labels", labels_path)):
            if found[name] != meta["sha256"][name]:
                raise UserError(
                    f"{path}: is not what {meta_path.name} was written for (SHA-256 {found[name][:12]}, "
                    f"there {meta['sha256'][name][:12]}): one of them was changed; {WAY_OUT}"
                )
    return store


def _check_meta_types(path: Path) -> None:
    """Refuse a meta file whose keys hold something else than what `encode` writes.

    One that is missing or no JSON object is left to `LatentStore.open`.
    """
    try:
        meta = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return
    if not isinstance(meta, dict):
        return
    for key, wanted in _META_TYPES.items():
        if key in meta and type(meta[key]) is not wanted:
            raise UserError(
                f"{path}: {key} is {json.dumps(meta[key])[:60]} where {wanted.__name__} is wanted; {WAY_OUT}"
            )

    def require(condition: bool, key: str) -> None:
        if not condition:
            raise UserError(f"{path}: {key} is {json.dumps(meta[key])[:60]}, which makes no sense; {WAY_OUT}")

    if "view" in meta:
        require(meta["view"] in VIEWS, "view")
    for key in ("num_classes", "crops", "images"):
        if key in meta:
            require(meta[key] >= 1, key)
    if "class_names" in meta:
        require(all(isinstance(name, str) for name in meta["class_names"]), "class_names")
    if "sha256" in meta:
        hashes = meta["sha256"]
        require(all(isinstance(hashes.get(name), str) for name in ("latents", "labels")), "sha256")
    if "skipped_images" in meta:
        skipped = meta["skipped_images"]
        names = skipped.get("names")
        require(isinstance(names, list) and skipped.get("count") == len(names), "skipped_images")
        require(all(isinstance(name, str) for name in names), "skipped_images")


def open_vae(store: LatentStore, settings: Settings, device: str | torch.device) -> VAE:
    """The VAE of the settings, which must be that of the latents."""
    encode = settings.encode
    vae = VAE.from_pretrained(encode.vae, encode.vae_revision, device)
    path = latent_files(store.folder, store.split)[2]
    if "vae_sha256" in store.meta and store.meta["vae_sha256"] != vae.digest:
        raise UserError(
            f"{path}: was written for other weights of {vae.id} (SHA-256 {store.meta['vae_sha256'][:12]}, "
            f"now {vae.digest[:12]}); rerun encode (dvc repro), or correct encode.vae"
        )
    expected = vae.latent_shape(settings.data.image_size)
    if tuple(store.shape[1:]) != expected:
        raise UserError(
            f"{latent_files(store.folder, store.split)[0]}: latents of {list(store.shape[1:])}, but those of "
            f"{vae.id} at data.image_size {settings.data.image_size} are {list(expected)}; {WAY_OUT}"
        )
    return vae


def view_of(store: LatentStore) -> str | None:
    """As the meta file has it; None if it does not tell."""
    return store.meta.get("view")


def choose(rows: np.ndarray, count: int, seed: int, what: str) -> np.ndarray:
    """`count` of `rows` at random without replacement, or all if there are fewer."""
    return numpy_generator(seed, what).choice(rows, min(count, len(rows)), replace=False)


class SourceImages:
    """The images that latents were encoded from, by the row of the latents."""

    def __init__(self, store: LatentStore, settings: Settings, root: str | None = None):
        """Those of the settings' data, with `root` in place of `data.root` if it is given.

        Raises `UserError` if they are not there, are not those that were encoded into `store`, or if its meta
        file does not tell what these were.
        """
        data, meta = settings.data, store.meta
        path = latent_files(store.folder, store.split)[2]
        if data.dataset == "digits":
            if root not in (None, "digits"):
                raise UserError(
                    f"--compare-images {root}: data.dataset is digits, which has no folder; name none"
                )
            root = None
        elif root is not None and not Path(root).is_dir():
            raise UserError(f"--compare-images {root}: there is no such folder; correct the path")
        where = root or data.root or data.dataset
        if "images_sha256" not in meta:
            raise UserError(
                f"{path}: has no images_sha256, so it cannot be told which images the latents are of; "
                "leave out --compare-images"
            )
        split = meta.get("dataset_split", "train")
        self._source = open_images(data.dataset, root or data.root, split, data.classes)
        if self._source.digest != meta["images_sha256"]:
            raise UserError(
                f"{where}: its {len(self._source)} images ({split}) are not those that were encoded into "
                f"{store.folder}; name the folder of those, or rerun encode (dvc repro)"
            )
        left_out = set(meta["skipped_images"]["names"]) if "skipped_images" in meta else set()
        images = range(len(self._source))
        if left_out:
            images = [i for i in images if self._source.name_in_split(i) not in left_out]
        self._images = np.asarray(images)
        self._per_image = store.per_image
        labels = np.repeat(self._source.labels[self._images], self._per_image)
        if not np.array_equal(labels, store.labels):
            raise UserError(
                f"{latent_files(store.folder, store.split)[1]}: the labels are not those of the images in "
                f"{where}; {WAY_OUT}"
            )
        self._size = data.image_size
        self._mirrored = "mirror" in meta and meta["mirror"] and view_of(store) == "center"
        self.exact = view_of(store) == "center"
        """Whether `picture` is what was encoded, not the centre of an image of which a random crop was."""

    def image(self, row: int) -> int:
        """The number of the image that a row of the latents is of."""
        return int(self._images[row // self._per_image])

    def name(self, row: int) -> str:
        """What files call it."""
        return self._source.name_in_split(self.image(row))

    def picture(self, row: int) -> np.ndarray:
        """The centre view of the image, uint8 `[S, S, 3]`; mirrored where its mirror image was encoded.

        Raises `UserError` if the image cannot be read or does not decode.
        """
        try:
            view = center_view(self._source.load(self.image(row)), self._size)
        except BadImage as error:
            raise UserError(f"{error}, or choose others by another --seed") from None
        return view[:, ::-1] if self._mirrored and row % self._per_image else view

    def described(self) -> dict[str, Any]:
        """For `meta.json`."""
        return {"split": self._source.split, "count": len(self._source), "sha256": self._source.digest}
