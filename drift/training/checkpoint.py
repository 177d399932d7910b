"""Checkpoints of a training run: written whole or not at all, the two newest and every so many steps' kept.

A checkpoint is a folder `step-00001000/` with every tensor in `tensors.safetensors` and the small rest of
the state, and that file's SHA-256, in `state.json`. It is written under a temporary name, flushed to the disk
and renamed, so a kill at any moment leaves the previous one intact.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from drift.runtime.errors import UserError
from drift.runtime.files import sha256, sync
from drift.runtime.processes import Ranks

KEPT = 2
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors tells of the system's errors
_NAME = re.compile(r"step-(\d{8})")
_TENSORS = "tensors.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    step: int
    """Steps that were finished when it was written."""
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    path: Path

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin with `prefix.`, without it."""
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + ".")}

    def require(self, prefix: str, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`part(prefix)`, after a check that its names and shapes are those of `expected`.

        Raises `UserError` naming the file and the first tensor that differs.
        """
        found = self.part(prefix)
        way_out = "delete that folder, or run the stage with --fresh"
        for name in sorted(expected.keys() | found.keys()):
            has = tuple(found[name].shape) if name in found else "nothing"
            wants = tuple(expected[name].shape) if name in expected else "nothing"
            if has != wants:
                raise UserError(
                    f"{self.path}: {prefix}.{name} is {has} where this run has {wants}: a checkpoint of "
                    f"another model; {way_out}"
                )
        return found


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any] | None = None,
    *,
    keep_every: int = 0,
) -> Path:
    """Write the checkpoint of `step` into `folder` and drop all but the newest two.

    Those of a multiple of `keep_every` steps stay, unless it is 0. Those of later steps go: the run was to
    go on from them and could not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, draft = folder / f"step-{step:08d}", folder / f"tmp-{step:08d}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, draft / _TENSORS)
        content = {"step": step, "sha256": sha256(draft / _TENSORS), **(state or {})}
        (draft / "state.json").write_text(json.dumps(content, sort_keys=True))
        for path in (*draft.iterdir(), draft):
            sync(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft)  # makes room again on a disk that is full
        if isinstance(error, SafetensorError) and (code := _OS_ERROR.search(str(error))):
            number = int(code.group(1))
            raise OSError(number, os.strerror(number), str(draft)) from None
        if isinstance(error, OSError) and error.filename is None:  # which only `open` sets
            error.filename = str(draft)
        raise
    shutil.rmtree(final, ignore_errors=True)
    os.replace(draft, final)
    sync(folder)
    found = _found(folder)
    newest = [path for found_step, path in found if found_step <= step][:KEPT]
    for old_step, old in found:
        if old_step > step or (old not in newest and (not keep_every or old_step % keep_every)):
            shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path, device: torch.device | str = "cpu") -> Checkpoint | None:
    """The newest checkpoint in `folder` that reads back whole; None where there is none.

    A damaged one is reported on screen and passed over.
    """
    found = _found(folder)
    for step, path in found:
        try:
            state = json.loads((path / "state.json").read_text())
            if sha256(path / _TENSORS) != state["sha256"]:
                raise ValueError(f"{_TENSORS} is not what was written")
            tensors = load_file(path / _TENSORS, device=str(device))
            if (
                torch.device(device).type == "cpu"
            ):  # each is a view of the mapped file and would keep all of it
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            print(f"{path}: damaged ({error}); trying the one before", flush=True)
            continue
        return Checkpoint(step, tensors, state, path)
    if found:
        print(f"{folder}: no checkpoint there is whole; starting from step 0", flush=True)
    return None


def shared_checkpoint(folder: Path, ranks: Ranks) -> Checkpoint | None:
    """`load_checkpoint` by the first process for all, on the device of each; the others see no disk."""
    checkpoint = load_checkpoint(folder, ranks.device) if ranks.first else None
    facts = ranks.from_first((checkpoint.step, checkpoint.state, checkpoint.path) if checkpoint else None)
    if facts is None:
        return None
    step, state, path = facts
    return Checkpoint(step, ranks.tensors_from_first(checkpoint.tensors if checkpoint else {}), state, path)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as tensors named `<parameter index>.<key>`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; learning rates and the like stay as they are."""
    whole = optimizer.state_dict()
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        entries.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": entries, "param_groups": whole["param_groups"]})


def _found(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in `folder`, the newest first."""
    if not folder.is_dir():
        return []
    named = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(((int(m.group(1)), path) for m, path in named if m), reverse=True)
