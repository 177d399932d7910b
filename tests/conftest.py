"""Settings that hold for every test."""

import os
import signal

import pytest

# Before torch is loaded. One thread: the networks are too small for more, two workers share the cores, and a
# sum has the same order in every run. How long threads spin: see stages/__init__.py
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1500")

# Tests send these to commands, which would be deaf to them under nohup or in the background of a script
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def generator_folder(tmp_path_factory):
    """A small generator as the drift stage writes it, to be read only."""
    from small_generator import write_generator

    return write_generator(tmp_path_factory.mktemp("generator") / "generator")


@pytest.fixture(scope="module")
def pipe(generator_folder):
    """The `DriftPipeline` of that generator."""
    from drift.interop import DriftPipeline

    return DriftPipeline.from_pretrained(generator_folder)
