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
from drift.runtime.processes import Ranks, join, run_stage, spawn, stage_parser, wanted_processes

PROGRAM = """
import os
import signal
import sys
import time
import torch
from drift.runtime.errors import UserError
from drift.runtime.processes import join, run_stage, spawn

def main():
    code = spawn("two_ranks", sys.argv[1:], 2)
    if code is not None:
        return code
    with join(0.05 if "--silent" in sys.argv else 1, deterministic="--deterministic" in sys.argv) as ranks:
        total = ranks.sum(torch.tensor([1.0 + ranks.rank]))
        if ranks.first:
            print("sum", total.item(), "of", ranks.world_size, flush=True)
        if "--mistake" in sys.argv:
            raise UserError("colour = 'red': allowed: blue")
        if "--bug" in sys.argv and not ranks.first:
            raise ZeroDivisionError("a bug")
        if "--killed" in sys.argv and not ranks.first:
            os.kill(os.getpid(), signal.SIGKILL)
        if "--silent" in sys.argv and not ranks.first:
            time.sleep(60)
        if "--wait" in sys.argv:
            time.sleep(60)
        if "--share" in sys.argv:
            mine = {"a": torch.arange(3) + 5, "b": torch.tensor(0.5)} if ranks.first else {}
            print({name: t.tolist() for name, t in ranks.tensors_from_first(mine).items()}, flush=True)
        if "--flags" in sys.argv:
            cudnn, workspace = torch.backends.cudnn, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
            exact = torch.are_deterministic_algorithms_enabled()
            print("flags", exact, cudnn.deterministic, cudnn.benchmark, workspace, flush=True)
        ranks.barrier()

run_stage(main)
"""


def command_of(folder, *arguments):
    (folder / "two_ranks.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, "-m", "two_ranks", *arguments], "env": environment}


def run_program(folder, *arguments):
    command = command_of(folder, *arguments)
    return subprocess.run(**command, capture_output=True, text=True, timeout=120)


def test_two_processes_start_and_add_up(tmp_path):
    done = run_program(tmp_path, "--nproc", "2")  # not to be taken for an option of torchrun
    assert done.returncode == 0, done.stderr
    assert "sum 3.0 of 2" in done.stdout


def test_every_process_gets_the_tensors_of_the_first(tmp_path):
    done = run_program(tmp_path, "--share")
    assert done.stdout.count("{'a': [5, 6, 7], 'b': 0.5}") == 2


@pytest.mark.parametrize(
    ("argument", "flags"),
    [("--deterministic", "True True False :4096:8"), ("--default", "False False False None")],
)
def test_deterministic_algorithms_are_for_every_process_if_asked_for(tmp_path, argument, flags):
    assert run_program(tmp_path, "--flags", argument).stdout.count(f"flags {flags}") == 2


def test_a_mistake_in_ranks_ends_with_code_2_and_one_line(tmp_path):
    done = run_program(tmp_path, "--mistake")
    assert done.returncode == 2
    assert done.stderr.count("error: colour = 'red': allowed: blue\n") == 1
    assert "Traceback" not in done.stderr


def test_a_rank_that_is_killed_takes_the_run_down_and_is_named(tmp_path):
    done = run_program(tmp_path, "--killed")
    assert done.returncode == 137
    assert "error: process 1 was killed by SIGKILL (by hand, or by the kernel" in done.stderr
    assert "Traceback" not in done.stderr


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


def test_a_rank_that_is_silent_does_not_hang_the_run(tmp_path):
    done = run_program(tmp_path, "--silent")
    assert done.returncode == 3
    assert "process 0: the others are gone or silent (" in done.stderr


def test_a_bug_in_a_rank_keeps_its_traceback(tmp_path):
    done = run_program(tmp_path, "--bug")
    assert done.returncode not in (0, 2)
    assert "ZeroDivisionError: a bug" in done.stderr


def test_run_stage_turns_mistakes_into_code_2(capsys):
    def main():
        raise UserError("the thing: value; way out")

    with pytest.raises(SystemExit) as caught:
        run_stage(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: the thing: value; way out\n"


def test_run_stage_lets_bugs_through():
    with pytest.raises(ZeroDivisionError):
        run_stage(lambda: 1 / 0)


def test_ctrl_c_before_the_first_step_ends_quietly(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_stage(main)
    assert caught.value.code == 130
    assert capsys.readouterr().err == ""


def test_a_request_to_save_before_the_first_step_is_passed_over():
    program = "import os, signal, stages; os.kill(os.getpid(), signal.SIGUSR1); print('alive')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "alive\n"


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


def test_the_command_line_wins_over_the_setting():
    assert wanted_processes(3, 2) == 3
    assert wanted_processes(None, 2) == 2
    assert wanted_processes(None, None) == max(1, torch.cuda.device_count())


@pytest.mark.parametrize("by", ["the setting", "torchrun"])
def test_more_processes_than_gpus_are_refused_before_nccl_does(monkeypatch, by):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("NCCL is asked"))
    if by == "torchrun":
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}.items():
            monkeypatch.setenv(name, value)
    setting = {"the setting": r"hardware\.processes", "torchrun": "--nproc-per-node"}[by]
    with pytest.raises(UserError, match=rf"^3 processes .* 2 CUDA devices: .*lower .*{setting}"):
        if by == "torchrun":
            join(1.0).__enter__()
        else:
            spawn("no_module", [], wanted_processes(None, 3))


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


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "work/step-1"),
            "error: work/step-1: No space left on device; make room or move the work folder (DRIFT_WORK_DIR)",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nmore"),
            "error: out of memory (CUDA out of memory.); lower x",
        ),
        (allocate(lambda: torch.empty(2**60)), "error: out of memory (can't allocate memory: you tried to"),
        (allocate(lambda: np.empty(2**57)), "error: out of memory (Unable to allocate 1.00 EiB"),
    ],
    ids=["disk", "device", "torch", "numpy"],
)
def test_running_out_is_one_line_with_the_way_out(capsys, error, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_stage(main, memory="x")
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(line) and told.count("\n") == 1


def test_other_errors_of_the_system_keep_their_traceback():
    def main():
        raise FileNotFoundError(errno.ENOENT, "No such file", "a bug")

    with pytest.raises(FileNotFoundError):
        run_stage(main)
