"""The four stages of the pipeline, each a module to run: `python -m stages.drift --help`."""

import os
import signal
from contextlib import suppress

# OpenMP's threads spin for 300,000 rounds before they sleep, which makes two processes on the same cores up
# to 60 times slower instead of two; as many rounds as these cost nothing on idle cores (docs/log.md)
os.environ.setdefault("GOMP_SPINCOUNT", "1500")

# A request to save, while there is nothing to save yet or any more, is no reason to die
with suppress(ValueError):  # imported by another thread than the main one
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
