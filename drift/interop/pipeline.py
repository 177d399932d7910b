"""DriftPipeline: class-conditional images in one forward pass, as a diffusers pipeline.

    pipe = DriftPipeline.from_pretrained("artifacts/generator").to("cuda")
    images = pipe(class_labels=[207, 360], omega=1.5, generator=torch.Generator().manual_seed(0)).images

A folder of the pipeline holds `model_index.json`, `generator/` and, unless it is only named, `vae/`: configs
and safetensors, which are read as data. There is no code in it, and none is executed.
"""

import json
import operator
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drift.autoencoders import DiffusersAutoencoder, Pixels
from drift.data.levels import Rounding, to_uint8
from drift.evaluation.batches import in_batches
from drift.evaluation.sample import draw_sample, sample_generator, sample_latents
from drift.models.base import CONFIG_FILE, share_weights, weights_files
from drift.models.generator import Generator, read_class_names
from drift.runtime.errors import UserError
from drift.runtime.hub import download
from drift.runtime.torchvision import ensure_torchvision
from drift.runtime.work import SETTINGS_FILE, settings_in_force
from drift.runtime.yaml_files import read_yaml

ensure_torchvision()

from diffusers.models.modeling_utils import ModelMixin  # noqa: E402
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput  # noqa: E402

INDEX_FILE = "model_index.json"
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "token"}


class DriftPipeline(DiffusionPipeline):
    """Class-conditional generation by a drifting model (arXiv 2602.04770).

    Args:
        generator: the network that turns noise into latents.
        vae: an autoencoder of diffusers, which decodes latents into images; None if only latents are wanted,
            or if these are the pixels.
        id2label: name of each class by its number; a name may have several words, separated by commas.
        vae_reference: where the VAE came from: `id`, a hub id or a folder, and `revision`, which may be None.
            The id `pixels` says that the latents are the pixels, so that there is none.
    """

    model_cpu_offload_seq = "generator->vae"
    _optional_components = ["vae"]  # noqa: RUF012 (diffusers' name)

    def __init__(
        self,
        generator: Generator,
        vae: ModelMixin | None,
        id2label: dict[int, str] | None = None,
        vae_reference: dict[str, Any] | None = None,
    ):
        super().__init__()
        if vae is not None:
            autoencoder_kind(vae).scale_of(vae.config, "of the pipeline")  # complains before any work
        self.register_modules(generator=generator, vae=vae)
        self.id2label = {int(label): name for label, name in (id2label or {}).items()}
        self.vae_reference = vae_reference
        if self.makes_pixels and (channels := generator.config["in_channels"]) != 3:
            raise UserError(f"a generator of {channels} channels makes no pixels; name its VAE")
        self.register_to_config(id2label=self.id2label, vae_reference=vae_reference)

    @property
    def makes_pixels(self) -> bool:
        """Whether latents are pixels, so that no VAE is needed."""
        return (self.vae_reference or {}).get("id") == Pixels.id

    @property
    def labels(self) -> dict[str, int]:
        """Class number by name, each of a name's alternatives included, in the names' alphabetical order."""
        names = {}
        for label, name in self.id2label.items():
            for alternative in (name, *name.split(",")):
                names.setdefault(alternative.strip(), label)
        return dict(sorted(names.items()))

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Class numbers of class names; raises `UserError` for a name that no class has."""
        names, wanted = self.labels, [label] if isinstance(label, str) else label
        for name in wanted:
            if name not in names:
                near = [other for other in names if name.lower() in other.lower()] or list(names)
                raise UserError(
                    f"class {name!r}: no class has this name; try {', '.join(near[:10]) or 'numbers'}"
                )
        return [names[name] for name in wanted]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | np.ndarray | Tensor,
        omega: float | Sequence[float] = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
        style_indices: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        rounding: Rounding = "nearest",
    ) -> ImagePipelineOutput | tuple:
        """One image for each class label.

        Args:
            class_labels: classes of the images, each a number, NumPy's and PyTorch's included, or a name.
            omega: CFG strength of all or of each of them; 1 is none. It costs nothing.
            generator: source of the noise and the style indices, or one for each image; then an image does
                not depend on its company. `sample_generators` makes those of the fid stage.
            noise: `[B, C, h, w]`, standard normal, instead of being drawn.
            style_indices: `[B, S]`, instead of being drawn.
            output_type: `pil`; `np`, float32 `[B, H, W, 3]` in 0 to 1; `pt`, the same as a tensor
                `[B, 3, H, W]`; or `latent`, float32 `[B, C, h, w]` as the generator gives them. All but the
                last have exactly the 8-bit values that a PNG holds.
            return_dict: return an `ImagePipelineOutput`, or else a tuple of the images.
            rounding: to 8 bits, as the setting `fid.rounding`.

        Raises `UserError` for an unknown class or output type, and for a wrong number of generators.
        """
        classes = self._class_numbers(class_labels)
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type = {output_type!r}: allowed: {', '.join(OUTPUT_TYPES)}")
        if self.vae is None and not self.makes_pixels and output_type != "latent":
            raise UserError("this pipeline has no VAE: give it one (vae=...), or take output_type='latent'")
        device, dtype = self._execution_device, self.generator.dtype
        noise, style_indices = self._draw(len(classes), generator, noise, style_indices)
        strength = torch.as_tensor(omega, dtype=torch.float32, device=device).expand(len(classes))
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            inputs = noise.to(device, dtype), torch.tensor(classes, device=device), style_indices.to(device)
            latents = sample_latents(self.generator, *inputs, strength).float()
        images: Any = latents if output_type == "latent" else self._decode(latents, output_type, rounding)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _class_numbers(self, class_labels: Any) -> list[int]:
        if isinstance(class_labels, int | str) or getattr(class_labels, "ndim", 1) == 0:
            class_labels = [class_labels]
        numbers, last = [], self.generator.config.num_classes - 1
        for label in class_labels:
            try:
                number = self.get_label_ids(label)[0] if isinstance(label, str) else operator.index(label)
            except TypeError:
                raise UserError(f"class {label}: is neither a number nor a name of a class") from None
            if not 0 <= number <= last:
                raise UserError(f"class {label}: the classes are 0 to {last}")
            numbers.append(number)
        if not numbers:
            raise UserError("class_labels is empty: give at least one class")
        return numbers

    def _draw(
        self,
        count: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        noise: Tensor | None,
        style_indices: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Noise `[B, C, h, w]` and style indices `[B, S]`; what is given is only checked."""
        if generator is None or isinstance(generator, torch.Generator):
            generators = [generator] * count
        else:
            generators = list(generator)
        if len(generators) != count:
            raise UserError(f"{len(generators)} generators for {count} class labels: give one, or one each")
        drawn = zip(*(draw_sample(self.generator.config, each) for each in generators), strict=True)
        own_noise, own_style = (torch.stack(own) for own in drawn)
        for name, given, own in (("noise", noise, own_noise), ("style_indices", style_indices, own_style)):
            if given is not None and given.shape != own.shape:
                raise UserError(f"{name} {list(given.shape)}: the shape must be {list(own.shape)}")
        return own_noise if noise is None else noise, own_style if style_indices is None else style_indices

    def _decode(
        self, latents: Tensor, output_type: str, rounding: Rounding
    ) -> list[Image.Image] | np.ndarray | Tensor:
        decoded = latents  # which are finite
        if not self.makes_pixels:
            decode = autoencoder_kind(self.vae).decode_by
            decoded = in_batches(lambda part: decode(self.vae, part), latents)
        if not decoded.isfinite().all():  # rounding would hide it
            raise UserError(
                f"the VAE's images are not finite in {self.vae.dtype}: pipe.vae.to(torch.float32) may help, "
                "and the generator can stay as it is"
            )
        pixels = to_uint8(decoded, rounding).cpu().numpy()
        if output_type == "pil":
            return [Image.fromarray(image) for image in pixels]
        scaled = pixels.astype(np.float32) / 255
        return scaled if output_type == "np" else torch.from_numpy(scaled).permute(0, 3, 1, 2)

    @staticmethod
    def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
        """The random generators of the fid stage's samples number `indices` with the setting `seed`."""
        return [sample_generator(seed, index) for index in indices]

    def save_pretrained(self, save_directory: str | Path, include_vae: bool = True, **options: Any) -> None:
        """Write the pipeline into a folder, with diffusers' `options`; without the VAE, only its origin.

        Raises `UserError` if the VAE is to be left out and its origin is not known.
        """
        if self.vae is None or include_vae:
            super().save_pretrained(save_directory, **options)
            share_weights(Path(save_directory))
        elif self.vae_reference is None:
            raise UserError("where the VAE came from is not known, so it must be saved (include_vae=True)")
        else:
            bare = type(self)(self.generator, None, self.id2label, self.vae_reference)
            bare.save_pretrained(save_directory, **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        vae: ModelMixin | str | Path | None = None,
        load_vae: bool = True,
        variant: str | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> "DriftPipeline":
        """Load a pipeline from a folder or from the Hugging Face hub, on the CPU.

        Unlike diffusers' own loader it fills nothing that a file lacks with random numbers.

        Args:
            source: a folder that `save_pretrained` or the drift stage has written, or a hub id of the former.
            vae: an AutoencoderKL or AutoencoderRAE, or a folder or hub id of one, instead of the folder's or
                the one it names; `pixels` for a generator that needs none.
            load_vae: without it, the pipeline gives latents only.
            variant: another copy of the weights, such as `ema_09999` or fp16; the VAE may have none of it.
            revision: branch, tag or commit on the hub.
            torch_dtype: of the weights.
            options: `cache_dir`, `force_download`, `local_files_only` and `token` of huggingface_hub.

        Raises `UserError` if a file is missing or damaged, or the VAE is not known.
        """
        if options.pop("use_safetensors", None) is False:
            raise UserError("use_safetensors = False: weights are read from safetensors only")
        if unknown := sorted(options.keys() - _HUB_OPTIONS):
            raise TypeError(f"from_pretrained takes no {', '.join(unknown)}")
        folder, vae_folder, reference, names = _read_folder(str(source), revision, options)
        generator = Generator.from_pretrained(folder, variant=variant, torch_dtype=torch_dtype)
        if isinstance(vae, ModelMixin):
            return cls(generator, vae, names)
        wanted = reference if vae is None else {"id": str(vae), "revision": None}
        if not load_vae or (wanted or {}).get("id") == Pixels.id:
            return cls(generator, None, names, wanted)
        if vae is None and vae_folder is not None:
            has_variant = (variant or "").replace(".", "") in weights_files(vae_folder)
            loaded = DiffusersAutoencoder.from_pretrained(
                vae_folder, variant=variant if has_variant else None
            )
        else:
            if wanted is None:
                raise UserError(f"{source}: does not say which VAE it needs; name it (vae=..., or --vae)")
            loaded = DiffusersAutoencoder.from_pretrained(wanted["id"], wanted["revision"], **options)
            reference = {"id": loaded.id, "revision": loaded.revision}
        torch.nn.Module.to(loaded.model, torch_dtype)  # diffusers' own `to` warns of every cast
        return cls(generator, loaded.model, names, reference)


def autoencoder_kind(vae: ModelMixin) -> type[DiffusersAutoencoder]:
    """What knows the conventions of an autoencoder; raises `UserError` if nothing does."""
    return DiffusersAutoencoder.kind_named(type(vae).__name__)


def _read_folder(
    source: str, revision: str | None, options: dict[str, Any]
) -> tuple[Path, Path | None, dict[str, Any] | None, dict[int, str]]:
    """Folders of generator and VAE, the origin of the VAE, and the classes' names, as far as they are known.

    Raises `UserError` if `source` is neither a folder of the pipeline nor one of the drift stage.
    """
    folder = Path(source)
    if not folder.is_dir():
        what = f"{source}: is not a local folder, and"
        patterns, way_out = ["*.json", "*.safetensors"], "name the folder of a generator or of a pipeline"
        folder = download(source, revision, patterns, what=what, way_out=way_out, **options)
    if (index_file := folder / INDEX_FILE).is_file():
        try:
            index = json.loads(index_file.read_text(encoding="utf-8"))
            assert index["_class_name"] == "DriftPipeline"
            vae = None if index["vae"][0] is None else folder / "vae"
            names = {int(label): name for label, name in index["id2label"].items()}
            return folder / "generator", vae, index["vae_reference"], names
        except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError):
            raise UserError(f"{index_file}: damaged, or no DriftPipeline's; run drift export again") from None
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{source}: has neither {INDEX_FILE} nor {CONFIG_FILE}; name a generator or pipeline")
    names = dict(enumerate(read_class_names(folder) or []))
    settings = made_from(folder)
    if "vae" not in settings:  # of an imported generator
        return folder, None, None, names
    return folder, None, {"id": settings["vae"], "revision": settings.get("vae_revision")}, names


def made_from(folder: Path) -> dict[str, Any]:
    """The settings and inputs that the generator in `folder` depends on; empty where nothing tells them."""
    path, way_out = folder / SETTINGS_FILE, "get the folder again (dvc pull)"
    return settings_in_force(read_yaml(path, way_out)) if path.exists() else {}


def open_copies(
    source: str | Path, first: str = "model", revision: str | None = None, **options: Any
) -> dict[str, Callable[[], Generator]]:
    """What loads each copy of the weights that `source` has, by the copy's name, beginning with `first`.

    `source`, `revision` and `options` are those of `DriftPipeline.from_pretrained`.
    """
    folder = _read_folder(str(source), revision, options)[0]
    names = [first.replace(".", ""), *(name or "model" for name in weights_files(folder))]
    return {name: partial(Generator.from_pretrained, folder, variant=name) for name in dict.fromkeys(names)}
