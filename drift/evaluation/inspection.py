"""What all inspections share: latents and VAE that belong together, source images, pictures, `meta.json`."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
from drift.training.inputs import check_latents, load_autoencoder

WAY_OUT = "rerun the stage that made it (dvc repro) or fetch it (dvc pull)"
_COLUMNS = 8  # latents beside each other in a picture
SIDE = 96  # pixels; images are enlarged to at least this, so that a caption fits above each
_RED = (200, 0, 0)  # an image that cannot be decoded


@dataclass(frozen=True)
class Look:
    """What an inspection looks at."""

    count: int = 32
    """Latents to decode."""
    seed: int = 0
    images: str | None = None
    """The root of the images to show beside the latents, "" for `data.root`; None shows none."""
    device: str | torch.device = "cpu"


class _Meta(BaseModel):
    """What `encode` writes into the meta file; one from elsewhere may lack every key."""

    class Skipped(BaseModel):
        count: int = 0
        names: list[str]

    class Hashes(BaseModel):
        latents: str
        labels: str

    model_config = ConfigDict(strict=True)
    view: Literal["center", "augmented"] | None = None
    num_classes: PositiveInt | None = None
    class_names: list[str] | None = None
    shape: list[int] | None = None
    crops: PositiveInt | None = None
    mirror: bool = False
    images: PositiveInt | None = None
    images_sha256: str | None = None
    dataset_split: str = "train"
    vae_sha256: str | None = None
    skipped_images: Skipped = Skipped(names=[])
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
    with suppress(OSError):  # `LatentStore` complains about what cannot be read, or is no object
        try:
            _Meta.model_validate_json(meta_path.read_bytes())
        except ValidationError as error:
            wrong = error.errors()[0]
            if key := ".".join(map(str, wrong["loc"])):
                found = json.dumps(wrong["input"])[:60]
                raise UserError(f"{meta_path}: {key} is {found} ({wrong['msg']}); {WAY_OUT}") from None
    store = LatentStore.open(folder)
    meta, shape, names = _Meta.model_validate(store.meta), list(store.shape), store.class_names
    check_latents(store, settings, view or meta.view or "center")
    for key, fits in (
        ("shape", meta.shape in (None, shape)),
        ("class_names", len(names) == store.num_classes),
    ):
        if not fits:
            raise UserError(
                f"{meta_path}: {key} is {json.dumps(store.meta[key])[:60]}, but the latents beside it are "
                f"{shape}, of {store.num_classes} classes; {WAY_OUT}"
            )
    _ = store.per_image  # raises UserError for a number of images that does not fit
    if meta.sha256 is not None:
        found, stated = file_hashes(folder), meta.sha256.model_dump()
        for name, path in (("latents", latents_path), ("labels", labels_path)):
            if found[name] != stated[name]:
                raise UserError(
                    f"{path}: is not what {meta_path.name} was written for (SHA-256 {found[name][:12]}, "
                    f"there {stated[name][:12]}): one of them was changed; {WAY_OUT}"
                )
    return store


class SourceImages:
    """The images that latents were encoded from, by the row of the latents."""

    def __init__(self, store: LatentStore, settings: Settings, root: str = ""):
        """Those of the settings' data, with `root` in place of `data.root` if it is given.

        Raises `UserError` if they are missing, or are not those that were encoded into `store`.
        """
        data, meta = settings.data, _Meta.model_validate(store.meta)
        _, labels_path, meta_path = latent_files(store.folder, store.split)
        if root and not Path(root).is_dir():
            raise UserError(f"--compare-images {root}: there is no such folder; correct the path")
        if meta.images_sha256 is None:
            raise UserError(
                f"{meta_path}: has no images_sha256, so nobody can know which images the latents are of; "
                "leave out --compare-images"
            )
        where = root or data.root or data.dataset
        self.source = open_images(data.dataset, root or data.root, meta.dataset_split, data.classes)
        if self.source.digest != meta.images_sha256:
            raise UserError(
                f"{where}: its {len(self.source)} images ({meta.dataset_split}) are not those that were "
                f"encoded into {store.folder}; name the folder of those, or rerun encode (dvc repro)"
            )
        left_out = set(meta.skipped_images.names)
        self._images = [i for i in range(len(self.source)) if self.source.name_in_split(i) not in left_out]
        self._size, self._per_image = data.image_size, store.per_image
        labels = np.asarray(self.source.labels)[self._images]
        if not np.array_equal(labels.repeat(self._per_image), store.labels):
            raise UserError(f"{labels_path}: the labels are not those of the images in {where}; {WAY_OUT}")
        self.exact = meta.view == "center"
        """Whether `picture` is what was encoded: of an image cropped at random it is the centre."""
        self._mirrored = self.exact and meta.mirror

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


class Latents:
    """Latents with their VAE and, where they are to be compared, the images that they were encoded from."""

    def __init__(self, folder: str | Path, settings: Settings, look: Look, view: str | None = None):
        """`view` is what the latents must be of, None for any.

        Raises `UserError` for whatever is missing, damaged, changed or does not belong together.
        """
        self.store = open_latents(folder, settings, view)
        self.sources = None if look.images is None else SourceImages(self.store, settings, look.images)
        self.vae = load_autoencoder(self.store, settings, device=look.device)
        self._seed = look.seed
        self._decode = ImageDecoder(self.vae, min(look.count, settings.hardware.decode_batch))

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

    def described(self, rows: np.ndarray) -> dict[str, Any]:
        """What was read, for `meta.json`, and in `shown` the `rows` of the picture."""
        store, vae, sources = self.store, self.vae, self.sources
        shown = []
        for row in rows.tolist():
            label = int(store.labels[row])
            shown.append({"row": row, "label": label, "class": store.class_names[label]})
            if sources is not None:
                shown[-1]["image"] = sources.name(row)
        return {
            "latents": {
                "folder": str(store.folder),
                "shape": list(store.shape),
                "classes": store.num_classes,
                "view": store.meta.get("view"),
                "digest": store.digest,
            },
            "vae": {"id": vae.id, "revision": vae.revision, "sha256": vae.digest},
            "images": sources and {"count": len(sources.source), "sha256": sources.source.digest},
            "shown": shown,
        }


def bands(kinds: Mapping[str, np.ndarray], captions: Sequence[str]) -> Image.Image:
    """Pictures of n things in several kinds: a column per thing, a row per kind with its name to the left.

    `kinds` are uint8 `[n, S, S, 3]` by name, which is left out where there is only one; `captions` stand
    above each thing. After `_COLUMNS` things the next ones follow below.
    """
    n, size = len(captions), next(iter(kinds.values())).shape[1]
    columns, scale = min(_COLUMNS, n), -(-SIDE // size)
    row_labels = list(kinds) if len(kinds) > 1 else None
    strips = []
    for start in range(0, n, columns):
        part = slice(start, start + columns)
        heads = [_fitting(text, scale * size) for text in captions[part]]
        missing = columns - len(heads)
        padding = ((0, missing), (0, 0), (0, 0), (0, 0))
        images = [np.pad(kind[part], padding, constant_values=255) for kind in kinds.values()]
        grid = image_grid(
            np.concatenate(images),
            columns,
            scale=scale,
            row_labels=row_labels,
            column_labels=heads + [""] * missing,
        )
        strips.append(np.asarray(grid))
    return Image.fromarray(np.concatenate(strips))


def _fitting(text: str, pixels: int) -> str:
    font = ImageFont.load_default()
    while font.getlength(text) > pixels:
        text = text[:-1]
    return text


def prepare_out(out: str | Path, *inputs: str | Path) -> Path:
    """The folder to write into; raises `UserError` if it is one of the `inputs`, or cannot be written."""
    if any(Path(out).resolve() == Path(folder).resolve() for folder in inputs):
        raise UserError(f"--out {out}: is what is inspected; name another folder")
    check_writable(out)
    return Path(out)


def write_inspection(
    out: Path,
    pictures: Mapping[str, Image.Image],
    meta: Mapping[str, Any],
    lines: Sequence[str],
    warnings: Sequence[str],
) -> list[str]:
    """Write `pictures` by name, and `meta` with the `warnings`; returns the lines to print."""
    (out / "meta.json").unlink(missing_ok=True)  # that of an earlier inspection must not vouch for these
    for name, picture in pictures.items():
        save_png(out / name, picture)
    content = {**meta, "warnings": warnings, "files": list(pictures)}
    write_json(out / "meta.json", _finite_or_none(content))
    written = [f"written: {out / name}" for name in (*pictures, "meta.json")]
    return [*lines, *(f"warning: {warning}" for warning in warnings), *written]


def _finite_or_none(tree: Any) -> Any:
    """`tree` with null for every number that is not finite, as JSON can hold it."""
    if isinstance(tree, Mapping):
        return {key: _finite_or_none(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite_or_none(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
