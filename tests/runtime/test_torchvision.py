"""torchvision can be imported and used, whether or not its compiled part fits this torch."""

import subprocess
import sys

import pytest

from drift.runtime.torchvision import ensure_torchvision

USES_TORCHVISION = """
import numpy as np
from PIL import Image
from drift.runtime.torchvision import ensure_torchvision

ensure_torchvision()
ensure_torchvision()
import torchvision.ops
from torchvision import transforms

image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
small = transforms.Resize(4, transforms.InterpolationMode.BICUBIC)(image)
assert np.array_equal(small, image.resize((4, 4), Image.Resampling.BICUBIC))
"""


def test_torchvision_can_be_used():
    done = subprocess.run([sys.executable, "-c", USES_TORCHVISION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_torchvision_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match="torchvision"):
        ensure_torchvision()
