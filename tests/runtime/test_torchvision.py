import subprocess
import sys
from types import SimpleNamespace

import pytest

from drift.runtime import torchvision as torchvision_shim

USES_TORCHVISION = """
import numpy as np
from PIL import Image
from drift.runtime.torchvision import ensure_torchvision

declared = ensure_torchvision()
assert ensure_torchvision() is declared
from torchvision import transforms

image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
small = transforms.Resize(4, transforms.InterpolationMode.BICUBIC)(image)
assert np.array_equal(small, image.resize((4, 4), Image.Resampling.BICUBIC))
"""


def test_torchvision_can_be_used():
    done = subprocess.run([sys.executable, "-c", USES_TORCHVISION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_declared_where_the_compiled_part_loads(monkeypatch):
    monkeypatch.setattr(torchvision_shim, "_library", None)
    monkeypatch.setattr(torchvision_shim, "_compiled_part_loads", lambda: True)
    monkeypatch.setattr(torchvision_shim.torch.library, "Library", None)  # calling it would fail
    assert torchvision_shim.ensure_torchvision() is False
    assert torchvision_shim._library is None


def test_a_compiled_part_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "_C.so").write_bytes(b"made for another torch")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(torchvision_shim.importlib.util, "find_spec", lambda name: spec)
    assert torchvision_shim._compiled_part_loads() is False


def test_without_torchvision_the_error_says_so(monkeypatch):
    monkeypatch.setattr(torchvision_shim.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="torchvision is not installed"):
        torchvision_shim._compiled_part_loads()
