"""What a run of the sweep is called, and where its generator is."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from drift.runtime.errors import UserError
from experiments.mnist.settings import Sweep

RUN_FILE = "run.json"


class SweepRun(NamedTuple):
    """One generator of the sweep."""

    coupling: str
    metric: str
    tau: float
    seed: int

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.metric}-{self.coupling}-tau{self.tau:g}-seed{self.seed}"


def runs_of(sweep: Sweep) -> Iterator[SweepRun]:
    """All runs of a sweep, the first seed's first."""
    for seeds, temps in ((sweep.seeds, sweep.temps), (sweep.repeated_seeds, sweep.repeated_temps)):
        for seed, metric, tau, coupling in itertools.product(seeds, sweep.metrics, temps, sweep.couplings):
            yield SweepRun(coupling, metric, tau, seed)


def find_runs(folder: Path) -> dict[SweepRun, Path]:
    """The generators in a folder, in order of their runs; raises `UserError` if there are none."""
    found = {SweepRun(**json.loads(path.read_text())): path.parent for path in folder.glob(f"*/{RUN_FILE}")}
    if not found:
        raise UserError(
            f"{folder}: has no generators in it; the stage sweep or import_checkpoints writes them"
        )
    return dict(sorted(found.items()))
