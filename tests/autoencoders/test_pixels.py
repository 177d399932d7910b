"""Pixels as latents: nothing is lost, and nothing is done."""

import numpy as np
import torch

from drift.autoencoders import AUTOENCODERS
from drift.data.latents import as_floats, as_stored
from drift.data.levels import to_uint8

PIXELS = AUTOENCODERS["pixels"].from_pretrained("pixels", None, "cpu", "float32")


def test_every_level_survives_the_whole_way_to_the_bit():
    levels = torch.arange(256, dtype=torch.uint8).view(2, 16, 8, 1)
    images = torch.cat([levels, levels.flip(1), 255 - levels], dim=3)  # [2, 16, 8, 3]
    stored = as_stored(PIXELS.encode(images), PIXELS.storage_dtype)
    assert stored.dtype == torch.uint8 and np.array_equal(stored, images.numpy().transpose(0, 3, 1, 2))
    latents = as_floats(stored)
    expected = images.numpy().transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert latents.dtype == torch.float32 and np.array_equal(latents, expected)
    assert torch.equal(latents, PIXELS.encode(images, torch.ones_like(latents)))  # there is no posterior
    assert torch.equal(to_uint8(PIXELS.decode(latents)), images)


def test_decode_is_the_identity_with_its_gradient():
    latents = torch.randn(2, 3, 4, 4, requires_grad=True)
    images = PIXELS.decode(latents)
    assert torch.equal(images, latents)
    (images**2).sum().backward()
    torch.testing.assert_close(latents.grad, 2 * latents.detach())


def test_latents_are_images_of_any_size():
    assert PIXELS.latent_shape(7) == (3, 7, 7) and PIXELS.storage_dtype == np.uint8
    assert PIXELS.in_float32() is PIXELS and PIXELS.to(torch.device("meta")).device.type == "meta"
    assert len(PIXELS.digest) == 64
