"""What both inspections share: latents and VAE that belong together, source images, pictures, `meta.json`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageFont
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from torch import Tensor

from drift.data.datasets import open_images
from drift.data.images import BadImage
from drift.data.latents import LatentStore, file_hashes, latent_files
from drift.data.views import center_view
from drift.evaluation.pictures import image_grid, save_png
from drift.evaluation.sample import ImageDecoder
from drift.runtime.errors import UserError
from drift.runtime.files import check_writable, write_json
from drift.runtime.seeds import numpy_generator
from drift.settings import Settings
from drift.training.inputs import check_latents

WAY_OUT = "rerun the stage that made it (dvc repro) or fetch it (dvc pull)"
_COLUMNS = 8  # latents beside each other in a picture
_SIDE = 96  # pixels; images are enlarged to at least this, so that a caption fits above each
_RED = (200, 0, 0)  # an image that cannot be decoded


@dataclass(frozen=True)
class Look:
    """How an inspection looks."""

    count: int = 32
    """Latents to decode."""
    seed: int = 0
    compare: bool = False
    """Show the image of each latent."""
    root: str | None = None
    """Where the images are, if not in `data.root`."""
    device: str | torch.device = "cpu"


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    lines: list[str]
    """The numbers, for a person."""
    warnings: list[str]
    """What a person must look into, one line each; empty for latents and networks as they should be."""
    files: list[Path] = field(default_factory=list)
    """The pictures, and `meta.json` with all of it for a program."""

    def write(self, out: Path, pictures: Mapping[str, Image.Image], meta: Mapping[str, Any]) -> "Inspection":
        """Write the pictures, then `meta.json`; the one of an earlier inspection must not vouch for them."""
        (out / "meta.json").unlink(missing_ok=True)
        for name, picture in pictures.items():
            save_png(out / name, picture)
        content = {**meta, "warnings": self.warnings, "files": list(pictures)}
        write_json(out / "meta.json", finite_or_none(content))
        return Inspection(self.lines, self.warnings, [out / name for name in (*pictures, "meta.json")])


def prepare_out(out: str | Path, *inputs: str | Path) -> Path:
    """The folder to write into; raises `UserError` if it is one of the `inputs`, or cannot be written."""
    if any(Path(out).resolve() == Path(folder).resolve() for folder in inputs):
        raise UserError(f"--out {out}: is what is inspected; name another folder")
    check_writable(out)
    return Path(out)


class _Meta(BaseModel):
    """What `encode` writes into the meta file; one from elsewhere may lack every key."""

    model_config = ConfigDict(strict=True)
    view: Literal["center", "augmented"] | None = None
    num_classes: PositiveInt | None = None
    class_names: list[str] | None = None
    shape: list[int] | None = None
    crops: PositiveInt | None = None
    mirror: bool | None = None
    images: PositiveInt | None = None
    images_sha256: str | None = None
    dataset_split: str | None = None
    vae_sha256: str | None = None

    class Skipped(BaseModel):
        count: int
        names: list[str]

    class Hashes(BaseModel):
        latents: str
        labels: str

    skipped_images: Skipped | None = None
    sha256: Hashes | None = None


def open_latents(folder: str | Path, settings: Settings, view: str | None) -> LatentStore:
    """The latents of a folder, unchanged since they were written, as far as their meta file says.

    Raises `UserError` if a file is missing, damaged, changed, or not of these settings.
    """
    latents_path, labels_path, meta_path = latent_files(folder)
    if not Path(folder).is_dir():
        raise UserError(
            f"{folder}: there is no such folder of latents; run encode (dvc repro) or name another"
        )
    try:
        _Meta.model_validate(json.loads(meta_path.read_bytes()))
    except ValidationError as error:
        wrong = error.errors()[0]
        if key := ".".join(map(str, wrong["loc"])):
            found = json.dumps(wrong["input"])[:60]
            raise UserError(f"{meta_path}: {key} is {found} ({wrong['msg']}); {WAY_OUT}") from None
    except (OSError, ValueError):
        pass  # `LatentStore.open` complains
    store = LatentStore.open(folder)
    meta = store.meta
    check_latents(store, settings, view or meta.get("view") or "center")
    shape, names = list(store.shape), store.class_names
    for key, fits in (
        ("shape", meta.get("shape", shape) == shape),
        ("class_names", len(names) == store.num_classes),
    ):
        if not fits:
            raise UserError(
                f"{meta_path}: {key} is {json.dumps(meta[key])[:60]}, but the latents beside it are {shape}, "
                f"of {store.num_classes} classes; {WAY_OUT}"
            )
    _ = store.per_image  # raises UserError for a number of images that does not fit
    if "sha256" in meta:
        hashes = file_hashes(folder)
        for name, path in (("latents", latents_path), ("labels", labels_path)):
            if hashes[name] != meta["sha256"][name]:
                raise UserError(
                    f"{path}: is not what {meta_path.name} was written for (SHA-256 {hashes[name][:12]}, "
                    f"there {meta['sha256'][name][:12]}): one of them was changed; {WAY_OUT}"
                )
    return store


class SourceImages:
    """The images that latents were encoded from, by the row of the latents."""

    def __init__(self, store: LatentStore, settings: Settings, root: str | None = None):
        """Those of the settings' data, with `root` in place of `data.root` if it is given.

        Raises `UserError` if they are missing, or are not those that were encoded into `store`.
        """
        data, meta = settings.data, store.meta
        _, labels_path, meta_path = latent_files(store.folder, store.split)
        if root is not None and not Path(root).is_dir():
            raise UserError(f"--compare-images {root}: there is no such folder; correct the path")
        if "images_sha256" not in meta:
            raise UserError(
                f"{meta_path}: has no images_sha256, so nobody can know which images the latents are of; "
                "leave out --compare-images"
            )
        split, where = meta.get("dataset_split", "train"), root or data.root or data.dataset
        self.source = open_images(data.dataset, root or data.root, split, data.classes)
        if self.source.digest != meta["images_sha256"]:
            raise UserError(
                f"{where}: its {len(self.source)} images ({split}) are not those that were encoded into "
                f"{store.folder}; name the folder of those, or rerun encode (dvc repro)"
            )
        left_out = set(meta.get("skipped_images", {"names": ()})["names"])
        self._images = [i for i in range(len(self.source)) if self.source.name_in_split(i) not in left_out]
        self._size, self._per_image = data.image_size, store.per_image
        if not np.array_equal(np.repeat(self.source.labels[self._images], self._per_image), store.labels):
            raise UserError(f"{labels_path}: the labels are not those of the images in {where}; {WAY_OUT}")
        self.exact = meta.get("view") == "center"
        """Whether `picture` is what was encoded, and the centre of an image that was cropped at random."""
        self._mirrored = self.exact and meta.get("mirror", False)

    def name(self, row: int) -> str:
        return self.source.name_in_split(self._images[row // self._per_image])

    def picture(self, row: int) -> np.ndarray:
        """The centre view of a row's image, uint8 `[S, S, 3]`; mirrored where its mirror image was encoded.

        Raises `UserError` if the image cannot be read or does not decode.
        """
        try:
            view = center_view(self.source.load(self._images[row // self._per_image]), self._size)
        except BadImage as error:
            raise UserError(f"{error}, or choose others by another --seed") from None
        return view[:, ::-1] if self._mirrored and row % self._per_image else view


def bands(kinds: Mapping[str, np.ndarray], captions: Sequence[str]) -> Image.Image:
    """Pictures of n things in several kinds: a column per thing, a row per kind with its name to the left.

    `kinds` are uint8 `[n, S, S, 3]` by name, which is left out where there is only one; `captions` stand
    above each thing. After `_COLUMNS` things the next ones follow below.
    """
    n, size = len(captions), next(iter(kinds.values())).shape[1]
    columns, scale = min(_COLUMNS, n), -(-_SIDE // size)
    strips = []
    for start in range(0, n, columns):
        heads = [_fitting(text, scale * size) for text in captions[start : start + columns]]
        images = np.full((len(kinds), columns, size, size, 3), 255, np.uint8)
        images[:, : len(heads)] = [kind[start : start + columns] for kind in kinds.values()]
        labels = {"column_labels": heads + [""] * (columns - len(heads))}
        if len(kinds) > 1:
            labels["row_labels"] = list(kinds)
        strips.append(
            np.asarray(image_grid(images.reshape(-1, size, size, 3), columns, scale=scale, **labels))
        )
    return Image.fromarray(np.concatenate(strips))


def _fitting(text: str, pixels: int) -> str:
    font = ImageFont.load_default()
    while font.getlength(text) > pixels:
        text = text[:-1]
    return text


class Latents:
    """Latents with their VAE and, where they are to be compared, the images that they were encoded from."""

    def __init__(self, folder: str | Path, settings: Settings, look: Look, view: str | None = None):
        """`view` is what the latents must be of, None for any.

        Raises `UserError` for whatever is missing, damaged, changed or does not belong together.
        """
        self.store = open_latents(folder, settings, view)
        self.sources = SourceImages(self.store, settings, look.root) if look.compare else None
        encode, stated = settings.encode, self.store.meta.get("vae_sha256")
        self.vae = vae = encode.autoencoder.load(device=look.device)
        latents_path, _, meta_path = latent_files(folder)
        if stated not in (None, vae.digest):
            raise UserError(
                f"{meta_path}: was written for other weights of {vae.id} (SHA-256 {stated[:12]}, now "
                f"{vae.digest[:12]}); rerun encode (dvc repro), or correct encode.autoencoder"
            )
        shape, expected = tuple(self.store.shape[1:]), vae.latent_shape(settings.data.image_size)
        if shape != expected:
            raise UserError(
                f"{latents_path}: latents of {list(shape)}, but those of {vae.id} at data.image_size "
                f"{settings.data.image_size} are {list(expected)}; {WAY_OUT}"
            )
        self._seed = look.seed
        self._decode = ImageDecoder(vae, min(look.count, settings.hardware.decode_batch))

    def choose(self, rows: np.ndarray, count: int, what: str) -> np.ndarray:
        """`count` of `rows` at random, or all if there are fewer; in the order of their classes."""
        rows = numpy_generator(self._seed, what).choice(rows, min(count, len(rows)), replace=False)
        return rows[np.argsort(self.store.labels[rows], kind="stable")]

    def decoded(self, latents: Tensor) -> np.ndarray:
        """Latents `[n, C, H, W]` -> uint8 `[n, S, S, 3]`; plain red where one is not finite."""
        finite = latents.isfinite().flatten(1).all(1)
        images = self._decode(latents.where(finite[:, None, None, None], 0)).numpy()
        images[~finite.numpy()] = _RED
        return images

    def source_pictures(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The images of `rows` as a kind of `bands`, if they are compared."""
        return {} if self.sources is None else {"source": np.stack([self.sources.picture(r) for r in rows])}

    def described(self) -> dict[str, Any]:
        """What was read, for `meta.json`."""
        store, vae, images = self.store, self.vae, self.sources and self.sources.source
        return {
            "latents": {
                "folder": str(store.folder),
                "shape": list(store.shape),
                "classes": store.num_classes,
                "view": store.meta.get("view"),
                "digest": store.digest,
            },
            "vae": {"id": vae.id, "revision": vae.revision, "sha256": vae.digest},
            "images": images and {"count": len(images), "sha256": images.digest},
        }

    def described_rows(self, rows: np.ndarray) -> list[dict[str, Any]]:
        shown = []
        for row in rows.tolist():
            label = int(self.store.labels[row])
            shown.append({"row": row, "label": label, "class": self.store.class_names[label]})
            if self.sources is not None:
                shown[-1]["image"] = self.sources.name(row)
        return shown


def finite_or_none(tree: Any) -> Any:
    """`tree` with null for every number that is not finite, as JSON can hold it."""
    if isinstance(tree, Mapping):
        return {key: finite_or_none(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite_or_none(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
