"""Ranks, and how a stage ends: one line and code 2 for a mistake of the user, a traceback for a bug."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from imports import ROOT
from processes import in_processes

from drift.runtime.errors import UserError
from drift.runtime.processes import Ranks, join, run_stage, spawn, stage_parser

PROGRAM = """
import os
import signal
import sys
import time
from contextlib import contextmanager
import torch
from drift.runtime.errors import UserError
from drift.runtime.processes import join, run_stage, spawn

@contextmanager
def leaving_slowly(does):
    try:
        yield
    finally:
        if does and os.environ["RANK"] == "1":
            time.sleep(4)

def main():
    code = spawn("two_ranks", sys.argv[1:], 2)
    if code is not None:
        return code
    asked = set(sys.argv)
    limit, deterministic = 0.05 if "--silent" in asked else 1, "--deterministic" in asked
    with leaving_slowly("--mistake-of-one" in asked), join(limit, deterministic=deterministic) as ranks:
        total = ranks.sum(torch.tensor([1.0 + ranks.rank]))
        highest = ranks.highest([ranks.rank, -ranks.rank])
        exact = torch.are_deterministic_algorithms_enabled()
        workspace = "CUBLAS_WORKSPACE_CONFIG" in os.environ
        print(f"sum {total.item()} {highest} exact {exact} {workspace}\\n", end="", flush=True)
        if "--mistake" in asked or ("--mistake-of-one" in asked and not ranks.first):
            raise UserError("colour = 'red': allowed: blue")
        if "--bug" in asked and not ranks.first:
            raise ZeroDivisionError("a bug")
        if "--killed" in asked and not ranks.first:
            os.kill(os.getpid(), signal.SIGKILL)
        if "--wait" in asked or ("--silent" in asked and not ranks.first):
            time.sleep(60)
        if "--silent" in asked:
            model = torch.nn.Linear(2, 2)
            torch.nn.parallel.DistributedDataParallel(model)(torch.ones(1, 2)).sum().backward()
        ranks.barrier()

run_stage(main)
"""


def command_of(folder, *arguments):
    (folder / "two_ranks.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, "-m", "two_ranks", *arguments], "env": environment}


def run_program(folder, *arguments):
    return subprocess.run(**command_of(folder, *arguments), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_share_numbers(tmp_path, deterministic):
    # --nproc is not to be taken for an option of torchrun
    done = run_program(tmp_path, "--nproc", "2", *["--deterministic"] * deterministic)
    assert done.returncode == 0, done.stderr
    exact = f"exact {deterministic} {deterministic}"
    assert done.stdout.count(f"sum 3.0 [1, 0] {exact}\n") == 2


@pytest.mark.parametrize(
    ("how", "code", "line"),
    [
        ("--mistake", 2, "error: colour = 'red': allowed: blue\n"),
        ("--mistake-of-one", 2, "error: colour = 'red': allowed: blue\n"),
        ("--killed", 137, "error: process 1 was killed by SIGKILL (by hand, or by the kernel"),
        ("--silent", 3, "process 0: the others are gone or silent ("),
        ("--bug", 1, "error: process 1 failed; its traceback is above\n"),
    ],
)
@pytest.mark.slow
def test_a_rank_that_fails_ends_the_run_and_the_cause_is_one_line(tmp_path, how, code, line):
    done = run_program(tmp_path, how)
    assert done.returncode == code
    assert done.stderr.count(line) == 1
    assert done.stderr.count("error: ") == line.count("error: ")
    assert ("ZeroDivisionError: a bug" in done.stderr) == ("Traceback" in done.stderr) == (how == "--bug")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="there is no prctl")
def test_ranks_end_with_the_process_that_has_started_them(tmp_path):
    command = command_of(tmp_path, "--wait")
    with subprocess.Popen(**command, stdout=subprocess.PIPE, text=True) as process:
        assert "sum 3.0" in process.stdout.readline()
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == 2
        process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive


def write_late(ranks: Ranks, folder: Path) -> None:
    for turn in range(2):
        if ranks.rank == 1:
            time.sleep(1)
            (folder / f"written-{turn}").touch()
        ranks.barrier()
        assert (folder / f"written-{turn}").exists()


def test_a_barrier_guards_files_where_a_sum_does_not(tmp_path):
    """Collectives on a GPU return to the host at once."""
    assert in_processes(write_late, 2, tmp_path, like_nccl=True) == [0, 0]


def test_shares_cover_everything_once():
    parts = [list(range(12))[Ranks(r, 3, torch.device("cpu")).share(12, "x")] for r in range(3)]
    assert [i for part in parts for i in part] == list(range(12))
    with pytest.raises(UserError, match=r"classes_per_step = 10 .* 3 processes"):
        Ranks(0, 3, torch.device("cpu")).share(10, "drift.classes_per_step")


@pytest.mark.parametrize(
    ("by", "lower"), [("spawn", r"hardware\.processes"), ("torchrun", "--nproc-per-node")]
)
def test_more_processes_than_gpus_are_refused_before_nccl_does(monkeypatch, by, lower):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("NCCL is asked"))
    if by == "torchrun":
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}.items():
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^3 processes .* 2 CUDA devices: .*lower .*{lower}"):
        join(1.0).__enter__() if by == "torchrun" else spawn("no_module", [], 3)


@pytest.mark.parametrize("text", ["0", "-1", "two"])
def test_nproc_must_be_a_positive_number(text, capsys):
    with pytest.raises(SystemExit) as caught:
        stage_parser(None).parse_args(["--nproc", text])
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def allocate(too_much):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        too_much()
    return caught.value


UNREADABLE = FileNotFoundError(errno.ENOENT, "No such file", "a bug")
FULL = OSError(errno.ENOSPC, "No space left on device", "work/step-1")
CUDA = torch.OutOfMemoryError("CUDA out of memory.\nmore")
TORCH, NUMPY = allocate(lambda: torch.empty(2**60)), allocate(lambda: np.empty(2**57))


@pytest.mark.parametrize(
    ("error", "code", "start"),
    [
        (UserError("the thing: value; way out"), 2, "error: the thing: value; way out\n"),
        (FULL, 2, "error: work/step-1: No space left on device; make room"),
        (CUDA, 2, "error: out of memory (CUDA out of memory.)"),
        (TORCH, 2, "error: out of memory (can't allocate memory: you tried to"),
        (NUMPY, 2, "error: out of memory (Unable to allocate 1.00 EiB"),
        (KeyboardInterrupt(), 130, ""),  # Ctrl-C before the first step
        (ZeroDivisionError(), None, ""),
        (RuntimeError(), None, ""),
        (UNREADABLE, None, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_stage_ends_with_one_line_or_with_the_traceback_of_a_bug(capsys, error, code, start):
    def main():
        raise error

    with pytest.raises(type(error) if code is None else SystemExit) as caught:
        run_stage(main, memory="x")
    assert code is None or caught.value.code == code
    line = capsys.readouterr().err
    assert line.startswith(start) and line.count("\n") == bool(start)


def test_a_request_to_save_before_the_first_step_is_passed_over():
    program = "import os, signal, stages; os.kill(os.getpid(), signal.SIGUSR1); print('alive')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "alive\n"
