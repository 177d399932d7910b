"""Whether latents are those that the settings ask for, and their autoencoder."""

import re

import torch

from drift.autoencoders import AUTOENCODERS, Autoencoder
from drift.data.latents import LatentStore, check_meta, latent_files
from drift.runtime.errors import UserError
from drift.settings import Settings


def check_latents(store: LatentStore, settings: Settings, view: str) -> None:
    """Raise `UserError` if latents have another view, size, VAE, scale or precision than `settings` ask for,
    or are stored in another type.

    Of the others, only what the meta file states is compared: the scale if the VAE's config is on this
    machine, the revision if the settings name a commit (a branch may have moved).
    """
    encode, autoencoder = settings.encode, settings.encode.autoencoder
    expected = {"view": view, "image_size": settings.data.image_size, "vae": autoencoder.id}
    if "precision" not in encode.without_effect():
        expected["vae_precision"] = encode.precision
    if re.fullmatch("[0-9a-f]{40}", autoencoder.revision or ""):
        expected["vae_revision"] = autoencoder.revision
    if (known := autoencoder.known(settings.data.image_size)) is not None:
        expected["scaling_factor"] = known.scaling_factor
    check_meta(store, **expected)
    if (dtype := AUTOENCODERS[autoencoder.kind].storage_dtype) != store.dtype:
        raise UserError(
            f"{latent_files(store.folder, store.split)[0]}: holds {store.dtype}, but latents of kind "
            f"{autoencoder.kind} (encode.autoencoder) are stored as {dtype}; rerun encode (dvc repro), or "
            "correct the settings"
        )


def load_autoencoder(
    store: LatentStore, settings: Settings, precision: str = "float32", device: str | torch.device = "cpu"
) -> Autoencoder:
    """The autoencoder of the settings; raises `UserError` if `store` has not the latents of it."""
    latents_path, _, meta_path = latent_files(store.folder, store.split)
    autoencoder = settings.encode.autoencoder.load(precision, device)
    stated, found = store.meta.get("vae_sha256"), autoencoder.digest
    if stated not in (None, found):
        raise UserError(
            f"{meta_path}: was written for other weights of {autoencoder.id} (SHA-256 {stated[:12]}, now "
            f"{found[:12]}); rerun encode (dvc repro), or correct encode.autoencoder"
        )
    shape, expected = tuple(store.shape[1:]), autoencoder.latent_shape(settings.data.image_size)
    if shape != expected:
        raise UserError(
            f"{latents_path}: latents of {list(shape)}, but those of {autoencoder.id} at data.image_size "
            f"{settings.data.image_size} are {list(expected)}; rerun the stage that made them (dvc repro)"
        )
    return autoencoder
