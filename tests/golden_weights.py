"""The weights behind the golden numbers of the release, which are drawn rather than stored."""

import json
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def golden_config(folder: str) -> dict:
    """`model_config` of `tests/golden/<folder>`, as the release writes it."""
    return json.loads((GOLDEN / folder / "model.json").read_text())["model_config"]


def golden_params(folder: str) -> dict[str, np.ndarray]:
    """Path -> float32 array for every parameter of `tests/golden/<folder>`, by the recipe of the numbers."""
    model = json.loads((GOLDEN / folder / "model.json").read_text())
    rng = np.random.default_rng(model["weights_seed"])
    params = {}
    for path, shape in sorted(model["param_shapes"].items()):
        n = rng.standard_normal(shape)
        match path.rsplit("/", 1)[-1]:
            case "kernel":
                array = n / np.sqrt(np.prod(shape[:-1]))
            case "scale" | "weight":
                array = 1 + 0.1 * n
            case "embedding":
                array = 0.5 * n
            case _:
                array = 0.1 * n
        params[path] = array.astype(np.float32)
    return params


def golden_numbers(folder: str, file: str = "expected.npz") -> dict[str, np.ndarray]:
    """The expected inputs and outputs of `tests/golden/<folder>`, channels-last."""
    with np.load(GOLDEN / folder / file) as arrays:
        return dict(arrays)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
