"""Compare settings over seeds: mean, spread, and whether they differ by more.

Reads DVC's experiments since the last commit, or since --rev. A row is a set of
settings, with all its seeds. It is better or worse than the first row if the 95 %
intervals of the means (Student's t) do not overlap; the first row has the settings
of the commit, unless --against says otherwise. Three seeds are few, two too few.

examples:
  drift study
  drift study --against coupling=row --metrics fid precision recall

  make study SWEEP="seed=0,1,2 coupling=partial_two_sided,row"    queues, runs, compares
"""

import argparse
from typing import TYPE_CHECKING, Any

from drift.runtime.errors import UserError

if TYPE_CHECKING:
    from drift.evaluation.study import Run

USUAL = ("fid", "accuracy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="of metrics/fid.json (fid accuracy)")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings to compare with, as the table shows them",
    )
    parser.add_argument("--rev", metavar="REVISION", help="the commit that the experiments began from (HEAD)")


def run(args: argparse.Namespace) -> None:
    from drift.evaluation.report import markdown
    from drift.evaluation.study import groups, other_sources, read_experiments, table

    experiments = read_experiments(_shown(args.rev))
    told = ", ".join(f"{count} {what}" for what, count in experiments.left_out.items())
    if not experiments.runs:
        raise UserError(
            f"{args.rev or 'HEAD'}: no experiment of it has been measured ({told or 'there are none'}); "
            "make study runs some, --rev names an earlier commit"
        )
    known = {name for one in experiments.runs for name in one.metrics}
    if unknown := [name for name in args.metrics or () if name not in known]:
        raise UserError(f"--metrics {unknown[0]}: no experiment has it; there are {', '.join(sorted(known))}")
    runs = groups(experiments, _pairs(args.against, experiments.runs))
    print(markdown(table(runs, args.metrics or [name for name in USUAL if name in known])))
    print(f"\n{len(experiments.runs)} experiments", *([f"left out: {told}"] if told else []), sep="; ")
    if different := other_sources(experiments.runs):
        print("warning: they differ in code or data as well:", ", ".join(different))


def _pairs(texts: list[str], runs: "list[Run]") -> dict[str, str]:
    """KEY=VALUE as pairs. Raises `UserError` if no experiment has them all."""
    pairs = dict(text.split("=", 1) for text in texts if "=" in text)
    if len(pairs) < len(texts) or not any(run.params >= pairs.items() for run in runs):
        known = {f"{key}={value}" for run in runs for key, value in run.params if key in pairs}
        there = f"there are {', '.join(sorted(known))}" if known else "KEY=VALUE is needed, as in the table"
        raise UserError(f"--against {' '.join(texts)}: no experiment has these settings; {there}")
    return pairs


def _shown(revision: str | None) -> list[dict[str, Any]]:
    """What DVC says of its experiments. Raises `UserError` with DVC's reason."""
    import json
    import subprocess
    import sys

    command = [sys.executable, "-m", "dvc", "exp", "show", "--json"]
    if revision is not None:
        command += ["--rev", revision]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(
            f"DVC shows no experiments: {reason.removeprefix('ERROR: ')}; run this in the project's folder"
        )
    return json.loads(done.stdout)
