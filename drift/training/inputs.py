"""Whether latents are those that the settings ask for."""

import re

from drift.autoencoders import AUTOENCODERS
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
