"""DVC's experiments compared over seeds: mean, spread, and whether settings differ by more than the seeds do.

Training again with another seed moves a Fréchet distance by more than sampling again (arXiv 2606.20536), so
one run of each setting tells nothing.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy.special import stdtrit

from drift.runtime.watch import dotted

PARAMS_FILE, METRICS_FILE = "params.yaml", "metrics/fid.json"
NOT_COMPARED = ("seed", "hardware")  # the latter changes rounding at most
BETTER = {
    **dict.fromkeys(("fid", "kid"), "lower"),
    **dict.fromkeys(("accuracy", "inception_score", "precision", "recall"), "higher"),
}
LEVEL = 0.95

Params = frozenset[tuple[str, str]]
"""Dotted keys of `params.yaml` and their values as text, without `NOT_COMPARED`."""


class Run(NamedTuple):
    params: Params
    seed: Any
    metrics: Mapping[str, float]
    sources: Mapping[str, str]
    """Hashes of the code and data that no stage has made."""


class Experiments(NamedTuple):
    runs: list[Run]
    """Those that count, one for each params and seed, the oldest first."""
    baselines: list[Params]
    """Params of the commit that the experiments began from, and of the workspace."""
    left_out: Counter[str]
    """How many do not count, by what they are."""


def read_experiments(shown: Sequence[Mapping[str, Any]]) -> Experiments:
    """Take from what `dvc exp show --json` prints the experiments that have been measured.

    An experiment that failed or waits shows the metrics of the commit that it began from, so its state
    decides.
    """
    baselines, runs, left_out = [], {}, Counter()
    for baseline in shown:  # the workspace, then the commit
        if baseline["data"]:
            baselines.insert(0, _params(baseline["data"]))
        for experiment in reversed(baseline["experiments"] or []):
            state = (experiment["executor"] or {"state": "success"})["state"]
            found = experiment["revs"][0]
            if state != "success" or found["error"] or not found["data"]:
                left_out["failed" if state == "success" else state] += 1
                continue
            run = _run(found["data"])
            if not run.metrics:
                left_out["without metrics"] += 1
                continue
            former = runs.get((run.params, run.seed), run)
            left_out["repeated later with other metrics"] += former.metrics != run.metrics
            runs[run.params, run.seed] = run
    return Experiments(list(runs.values()), baselines, +left_out)


def _params(data: Mapping[str, Any]) -> Params:
    kept = {
        key: value for key, value in _content(data, "params", PARAMS_FILE).items() if key not in NOT_COMPARED
    }
    return frozenset(dotted(kept).items())


def _run(data: Mapping[str, Any]) -> Run:
    made = tuple(f"{path}/" for path in data["outs"])
    return Run(
        params=_params(data),
        seed=_content(data, "params", PARAMS_FILE).get("seed"),
        metrics={
            name: value
            for name, value in _content(data, "metrics", METRICS_FILE).items()
            if isinstance(value, int | float) and math.isfinite(value)
        },
        sources={
            path: dep["hash"]
            for path, dep in data["deps"].items()
            if dep["hash"] and not f"{path}/".startswith(made)
        },
    )


def _content(data: Mapping[str, Any], kind: str, path: str) -> Mapping[str, Any]:
    """What a file of params or metrics holds; nothing if it is missing or cannot be read."""
    return data[kind].get(path, {}).get("data") or {}


class Spread(NamedTuple):
    """Of the runs of one set of params."""

    mean: float
    std: float
    """Of a sample (n - 1); 0 of a single run."""
    count: int

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Spread":
        std = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        return cls(statistics.fmean(numbers), std, len(numbers))

    def interval(self) -> tuple[float, float]:
        """Where the mean over all seeds lies, by Student's t: mean ± t std / sqrt(n); needs two runs."""
        half = float(stdtrit(self.count - 1, (1 + LEVEL) / 2)) * self.std / math.sqrt(self.count)
        return self.mean - half, self.mean + half


def verdict(metric: str, one: Spread, other: Spread) -> str:
    """What `one` is against `other`: better or worse only where their intervals do not overlap.

    lower or higher, of a metric that is neither better large nor small.
    """
    if min(one.count, other.count) < 2:
        return "one seed"
    (low, high), (other_low, other_high) = one.interval(), other.interval()
    if low <= other_high and other_low <= high:
        return "inconclusive"
    found = "lower" if high < other_low else "higher"
    if metric not in BETTER:
        return found
    return "better" if found == BETTER[metric] else "worse"


def groups(experiments: Experiments, against: Mapping[str, str]) -> dict[Params, list[Run]]:
    """Runs by params. First stand those that the others are judged against.

    They are the oldest with the values `against`, if there are any; without, those of the commit, or else of
    the workspace, or else the oldest.
    """
    by_params: dict[Params, list[Run]] = {}
    for run in experiments.runs:
        by_params.setdefault(run.params, []).append(run)
    chosen = [params for params in experiments.baselines if params in by_params]
    if against:
        chosen = [params for params in by_params if params >= against.items()]
    first = [*chosen, *by_params][:1]
    return {params: by_params[params] for params in [*first, *by_params]}


def names(params: Iterable[Params]) -> list[str]:
    """What each has that not all have."""
    every = [dict(of_one) for of_one in params]
    keys = sorted({key for of_one in every for key in of_one})
    differ = [key for key in keys if len({of_one.get(key) for of_one in every}) > 1]
    return [
        ", ".join(f"{key}={of_one[key]}" if key in of_one else f"{key} unset" for key in differ) or "all"
        for of_one in every
    ]


def table(runs: Mapping[Params, Sequence[Run]], metrics: Sequence[str]) -> list[list[str]]:
    """Titles, then a row for each params; the verdicts are against the first."""
    first = next(iter(runs.values()))
    rows = [["settings", "seeds", *metrics]]
    for name, of_one in zip(names(runs), runs.values(), strict=True):
        cells = [_cell(metric, of_one, None if of_one is first else first) for metric in metrics]
        rows.append([name, str(len(of_one)), *cells])
    return rows


def _cell(metric: str, runs: Sequence[Run], reference: Sequence[Run] | None) -> str:
    """`0.561 ± 0.061, worse`; without a verdict if there is no reference."""
    numbers, others = (
        [run.metrics[metric] for run in some if metric in run.metrics] for some in (runs, reference or ())
    )
    if not numbers:
        return "-"
    spread = Spread.of(numbers)
    text = f"{spread.mean:.4g}" + (f" ± {spread.std:.2g}" if len(numbers) > 1 else "")
    text += f" ({len(numbers)} of {len(runs)})" if len(numbers) < len(runs) else ""
    return f"{text}, {verdict(metric, spread, Spread.of(others))}" if others else text


def other_sources(runs: Iterable[Run]) -> list[str]:
    """Paths of code and data that are not the same in all runs that have them."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for path, value in run.sources.items():
            found.setdefault(path, set()).add(value)
    return sorted(path for path, values in found.items() if len(values) > 1)
