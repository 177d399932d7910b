"""DINOv2's patch tokens against those of transformers."""

import numpy as np
import pytest
import torch
from transformers import Dinov2Model, Dinov2WithRegistersModel

from drift.features import DINOv2Features


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "folder", "before"),
    [(Dinov2Model, "dinov2_folder", 1), (Dinov2WithRegistersModel, "registers_folder", 4)],
)
def test_the_sets_are_those_of_the_patch_tokens(kind, folder, before, request):
    folder = request.getfixturevalue(folder)
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    theirs = kind.from_pretrained(folder).eval()((images - mean) / std).last_hidden_state
    sets = DINOv2Features(folder)(images)
    assert {name: tuple(x.shape[1:]) for name, x in sets.items()} == {
        "dinov2": (256, 12),
        "dinov2_mean_2": (64, 12), "dinov2_std_2": (64, 12),
        "dinov2_mean_4": (16, 12), "dinov2_std_4": (16, 12),
        "dinov2_mean": (1, 12), "dinov2_std": (1, 12),
    }  # fmt: skip
    tokens = theirs[:, before:]
    torch.testing.assert_close(sets["dinov2"], tokens)
    grid = tokens.double().numpy().reshape(2, 16, 16, 12)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        patch = grid[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(2, 16, 12)
        place = 4 * row + column
        np.testing.assert_allclose(sets["dinov2_mean_4"][:, place], patch.mean(1), rtol=1e-4, atol=1e-5)
        expected = np.sqrt(patch.var(1) + 1e-6)
        np.testing.assert_allclose(sets["dinov2_std_4"][:, place], expected, rtol=1e-4, atol=1e-5)
