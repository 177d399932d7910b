"""The MAE that the mae stage has made: trained here, or imported (paper A.5)."""

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from drift.autoencoders import Autoencoder
from drift.features.base import Encoder, EncoderOptions, register
from drift.features.latent import whole_latent


class MAEEncoder(Encoder):
    """The feature sets of a network that encodes as `LatentMAE` does, and `global`, the whole latent."""

    def __init__(self, network: Any, *, drop_duplicates: bool = False):
        super().__init__()
        self.network, self._drop_duplicates = network, drop_duplicates

    def encode(self, latents: Tensor) -> dict[str, Tensor]:
        sets = self.network.encode(latents, drop_duplicates=self._drop_duplicates)
        return sets | whole_latent(latents)


@register
class MAEOptions(EncoderOptions):
    """Maps of the MAE's encoder, their moments over the map and over patches, and the whole latent."""

    needs_mae = True
    encoder: Literal["mae"] = "mae"
    duplicates: Literal["keep", "drop"] = "keep"
    """Feature sets that equal another by their shape (a 4x4 mean of a 4x4 map): keep (release) or drop."""

    def load(self, *, mae: Path | None = None, autoencoder: Autoencoder | None = None) -> Encoder:
        from drift.models.mae import LatentMAE  # diffusers takes a second

        assert mae is not None, "of an encoder that needs_mae"
        network = LatentMAE.from_pretrained(mae)
        for head in ("decoder", "classifier"):  # as large as the encoder
            network.add_module(head, None)
        return MAEEncoder(network, drop_duplicates=self.duplicates == "drop")
