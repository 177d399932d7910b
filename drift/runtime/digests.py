"""What weights are, as a hash: the same wherever and in whatever file they lie."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def tensors_digest(tensors: Iterable[tuple[str, Tensor]], said: str = "") -> str:
    """SHA-256, in hexadecimal, of `said` and of names, shapes and bytes of tensors, in the order given."""
    digest = hashlib.sha256(said.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
