"""Kills at random moments: does a run end with the same result?

    python tests/torture.py                            # everything, up to half an hour on two cores
    python tests/torture.py --stages encode --kills 20
    python tests/torture.py --minutes 5                # begins nothing new after that, and says what is left

A small project is made in a temporary folder. Each stage runs once undisturbed, with one process and with
two. Then it is started and killed by SIGKILL at a random moment, again and again, and its last run left to
finish: every file that it publishes must have the same bytes (of `logs.jsonl` the times are not compared).
Half of the kills hit all processes at once, as a power failure does, and half the first one alone. `encode`
must also give the same bytes with one process and with two. The exit code is 1 if anything differs.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))

from project import compare, copy_project, draw_images

CLASSES, PER_CLASS = 8, 40
SETTINGS = {
    "data": {"dataset": "folder", "root": "images", "image_size": 64, "classes": CLASSES},
    "encode": {"crops": 2, "posterior": "sample", "mirror": True},
    "mae": {
        "width": 16, "norm_groups": 4, "batch_size": 32, "warmup_steps": 20, "lr_schedule": "constant",
        "finetune_steps": 40, "finetune_ramp_steps": 10, "held_out": 16, "evaluate_every": 40, "lr": 4.0e-3,
    },
    "drift": {
        "hidden": 32, "depth": 2, "heads": 2, "style_codebooks": 2, "classes_per_step": 8, "generated": 6,
        "positives": 8, "unconditional": 4, "warmup_steps": 20, "lr_schedule": "constant", "lr": 2.0e-4,
        "queue_per_class": 32, "queue_global": 100, "push_per_step": 16,
    },
    "fid": {"picture_classes": CLASSES},
    "hardware": {
        "checkpoint_every": 10, "log_every": 10, "encode_batch": 8, "mae_micro_batch": 8,
        "classes_per_pass": 2,
    },
}  # fmt: skip
STAGES = ("encode", "mae", "drift")


class Torture:
    def __init__(self, folder: Path, *, steps: int, seed: int):
        self.steps, self.random = steps, random.Random(seed)
        self.passed: list[bool] = []
        self.project = copy_project(folder)
        draw_images(folder / "images/train", tuple(map(str, range(CLASSES))), PER_CLASS, ".jpeg")
        self.project.settings(**SETTINGS)
        self.project.settings(mae={"steps": steps}, drift={"steps": steps})

    def tell(self, what: str, difference: str, when: str = "") -> None:
        """Note how a trial came out."""
        self.passed.append(not difference)
        head = "FAILED" if difference else "ok    "
        print(f"{head} {what}: {difference or 'the same bytes'}{when}", flush=True)

    def command(self, stage: str, out: str, processes: int) -> tuple[str, ...]:
        """A stage of the project; what it writes lies under `out`."""
        inputs = {
            "encode": ("--view", "augmented"),
            "mae": ("--latents", "inputs/augmented", "--held-out-plot", f"{out}/held_out.csv"),
            "drift": ("--latents", "inputs/center", "--mae", "inputs/mae"),
        }[stage]
        plot = () if stage == "encode" else ("--plot", f"{out}/plot.csv")
        command = (sys.executable, "-m", f"stages.{stage}", *inputs, *plot)
        return (*command, "--out", f"{out}/result", "--nproc", str(processes))

    def run(self, stage: str, out: str, processes: int = 1, *arguments: str) -> float:
        """Run a stage to its end; seconds that it took."""
        began = time.monotonic()
        self.project.run(*self.command(stage, out, processes), *arguments)
        return time.monotonic() - began

    def prepare(self) -> None:
        """The inputs of `mae` and `drift`."""
        for view in ("center", "augmented"):
            self.project.stage("encode", "--view", view, "--out", f"inputs/{view}")
        self.project.settings(mae={"steps": 40})
        self.project.stage("mae", "--latents", "inputs/augmented", "--out", "inputs/mae")
        self.project.settings(mae={"steps": self.steps})

    def stage(self, stage: str, kills: int) -> Iterator[None]:
        """All trials of a stage; before each of them one may stop."""
        yield
        took = self.run(stage, f"{stage}-1", 1, "--fresh")
        yield
        self.run(stage, f"{stage}-2", 2, "--fresh")
        if stage == "encode":
            difference = compare(self.project.folder / "encode-1", self.project.folder / "encode-2")
            self.tell("encode, 1 and 2 processes", difference)
        for processes in (1, 2):
            yield
            self.kill(stage, processes, kills, took)

    def kill(self, stage: str, processes: int, kills: int, took: float) -> None:
        """Start, kill, start again; where the work comes to its end before that, it begins anew."""
        out, moments, differences = f"{stage}-killed-{processes}", [], []
        reference, found = self.project.folder / f"{stage}-{processes}", self.project.folder / out
        self.forget(stage)
        while len(moments) < kills:
            process = self.project.start(*self.command(stage, out, processes))
            moment = self.random.uniform(0, took)
            try:
                code = process.wait(moment)
            except subprocess.TimeoutExpired:
                moments.append(f"{moment:.0f}")
            else:  # what was left of the work took less than that
                differences.append(compare(reference, found) if code == 0 else f"exit code {code}")
                self.forget(stage)
                continue
            first = psutil.Process(process.pid)
            others = first.children(recursive=True)
            for victim in (first, *others) if self.random.random() < 0.5 else (first,):
                with suppress(psutil.NoSuchProcess):  # it has just come to its end
                    victim.kill()
            process.wait()
            psutil.wait_procs(others, timeout=30)  # those that the kernel ends, too
        self.run(stage, out, processes)
        differences.append(compare(reference, found))
        what = f"{stage}, {processes} process{'es' if processes > 1 else ''}, {len(moments)} kills"
        self.tell(
            what, "; ".join(filter(None, differences)), f" (after {', '.join(moments)} s of {took:.0f} s)"
        )

    def forget(self, stage: str) -> None:
        """Let the next run of the stage start anew."""
        shutil.rmtree(self.project.folder / ".work" / stage, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--kills", type=int, default=5, help="of each stage, with one process and with two")
    parser.add_argument("--steps", type=int, default=200, help="of mae and drift, at least 40")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--minutes", type=float, default=45, help="begin nothing new after so long")
    parser.add_argument("--keep", type=Path, help="make the project in this new folder, and leave it there")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    torture = Torture(folder, steps=args.steps, seed=args.seed)
    left_out = []
    try:
        torture.prepare()
        for stage in args.stages:
            for _ in torture.stage(stage, args.kills):
                if time.monotonic() > deadline:
                    left_out.append(stage)
                    break
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{sum(torture.passed)} of {len(torture.passed)} trials passed")
    if left_out:
        print(f"--minutes {args.minutes:g} ran out: trials of {', '.join(left_out)} were left out")
    return 0 if all(torture.passed) else 1


if __name__ == "__main__":
    sys.exit(main())
