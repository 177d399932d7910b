from pathlib import Path

import numpy as np
import pytest
import torch

from drift.data.datasets import open_images
from drift.data.views import center_view
from drift.models.classifier import ImageClassifier
from drift.runtime.errors import UserError

COMMITTED = Path(__file__).parents[2] / "pretrained/digits_classifier"
SMALL = {"image_size": 12, "widths": (4, 6), "feature_dim": 5, "num_classes": 3}


@pytest.fixture
def small():
    torch.manual_seed(0)
    return ImageClassifier(**SMALL)


@pytest.fixture
def images():
    return 255 * torch.rand(7, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_training_features_are_standardised(small, images):
    features = small.train().features(images)
    assert features.shape == (7, 5)
    torch.testing.assert_close(features.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std(0, correction=0), torch.ones(5), atol=1e-2, rtol=0)
    assert small.logits(features).shape == (7, 3)


@torch.no_grad()
def test_loads_what_was_saved(small, images, tmp_path):
    small.features(images)  # moves the running statistics away from their start
    small.save_pretrained(tmp_path)
    loaded = ImageClassifier.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval().features(images), small.eval().features(images))


@pytest.mark.parametrize(
    "wrong", [{"widths": ()}, {"widths": (8, 0)}, {"num_classes": 0}, {"feature_dim": -1}]
)
def test_impossible_sizes_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ImageClassifier(**wrong)


@torch.no_grad()
def test_committed_classifier_reads_held_out_digits_by_features_that_all_count():
    source = open_images("digits", None, "held_out", 10)
    images = np.stack([center_view(source.load(i), 32) for i in range(len(source))])
    classifier = ImageClassifier.from_pretrained(COMMITTED)
    features = classifier.features(torch.from_numpy(images).permute(0, 3, 1, 2).float())
    predicted = classifier.logits(features).argmax(1).numpy()
    assert len(source) == 360 and (predicted == source.labels).mean() >= 0.98
    assert features.shape == (360, 64)
    assert features.std(0).min() > 0.5 and features.std(0).max() < 2
    assert np.linalg.matrix_rank(np.cov(features.double().numpy(), rowvar=False)) == 64
