"""What the drift is computed in: one file per encoder, and a registry."""

from drift.features.base import ENCODERS, Encoder, FeatureEncoder, load_encoders
from drift.features.latent import LatentFeatures
from drift.features.mae import MAEEncoder, MAEFeatures

__all__ = [
    "ENCODERS",
    "Encoder",
    "FeatureEncoder",
    "LatentFeatures",
    "MAEEncoder",
    "MAEFeatures",
    "load_encoders",
]
