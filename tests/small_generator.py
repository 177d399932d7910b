"""A small generator as the drift stage writes it."""

import json

import torch
import yaml
from imports import ROOT

from drift.models.generator import Generator

VAE_FOLDER = str(ROOT / "pretrained/digits_vae")
SIZES = {
    "in_channels": 4, "input_size": 4, "num_classes": 3, "hidden_size": 32, "depth": 2, "num_heads": 2,
    "patch_size": 2, "mlp_ratio": 2.0, "context_tokens": 2, "style_codebooks": 3, "style_entries": 8,
}  # fmt: skip
NAMES = ["tench, Tinca tinca", "cat", "7"]


def write_generator(folder, seed=0, names=NAMES, vae=VAE_FOLDER, **sizes):
    """A folder as the drift stage writes it; with `vae="pixels"`, of a generator that needs none."""
    torch.manual_seed(seed)
    model = Generator(**{**SIZES, **sizes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the last layer starts at zero
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    (folder / "classes.json").write_text(json.dumps(names))
    settings = {"stage": "drift", "decides": {"vae": vae, "vae_revision": None, "drift": {"steps": 3}}}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings | {"how": {"torch": "x"}}))
    return folder
