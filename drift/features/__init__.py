"""What the drift is computed in: one file per encoder, and a registry."""

from drift.features.base import ENCODERS, Encoder, EncoderOptions, ImageEncoder, load_encoders
from drift.features.convnext import ConvNextFeatures, ConvNextOptions
from drift.features.dinov2 import DINOv2Features, DINOv2Options
from drift.features.latent import LatentOptions
from drift.features.mae import MAEEncoder, MAEOptions
from drift.features.moco import MoCoFeatures, MoCoOptions

__all__ = [
    "ENCODERS",
    "ConvNextFeatures",
    "ConvNextOptions",
    "DINOv2Features",
    "DINOv2Options",
    "Encoder",
    "EncoderOptions",
    "ImageEncoder",
    "LatentOptions",
    "MAEEncoder",
    "MAEOptions",
    "MoCoFeatures",
    "MoCoOptions",
    "load_encoders",
]
