"""The autoencoder that settings name: `encode.autoencoder`."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import model_validator

from drift.autoencoders import AUTOENCODERS, Autoencoder, Latents
from drift.settings.base import Section, Text, name_in


class AutoencoderSource(Section):
    """Which autoencoder, and where it is. A string alone is the `source` of kind `kl`, or names a kind."""

    kind: Annotated[str, name_in(AUTOENCODERS)] = "kl"
    """`kl`: an AutoencoderKL of diffusers. `rae`: its AutoencoderRAE, whose encoders are in transformers.
    `pixels`: none; the latents are the pixels, stored as 8 bits."""
    source: Text | None = None
    """A local folder or a hub id; null for `pixels`, which need no files."""
    revision: Text | None = None
    """Revision on the hub; null is its default branch."""

    @model_validator(mode="before")
    @classmethod
    def _by_one_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return {"kind": value} if value in AUTOENCODERS else {"source": value}

    def complaints(self) -> Iterator[str]:
        needed = self.needs_source
        is_id = self.source in AUTOENCODERS and not AUTOENCODERS[self.source].needs_source
        yield from self.broken(
            (needed and self.source is None, "source", f"a folder or a hub id, where kind is {self.kind}"),
            (not needed and self.source is not None, "source", f"null, where kind is {self.kind}"),
            (
                needed and is_id,
                "source",
                f"./{self.source}, if it is a folder, as {self.source} names a kind",
            ),
            (not needed and self.revision is not None, "revision", f"null, where kind is {self.kind}"),
        )

    @property
    def needs_source(self) -> bool:
        return AUTOENCODERS[self.kind].needs_source

    @property
    def id(self) -> str:
        """The `source`, or the name of a kind that has none."""
        return self.source or self.kind

    def load(self, precision: str = "float32", device: str | torch.device = "cpu") -> Autoencoder:
        """Raises `UserError` if it is not there or not whole."""
        return AUTOENCODERS[self.kind].from_pretrained(self.id, self.revision, device, precision)

    def known(self, image_size: int) -> Latents | None:
        """What is known of the latents without loading it; raises `UserError` for what cannot be."""
        return AUTOENCODERS[self.kind].known(self.id, self.revision, image_size)
