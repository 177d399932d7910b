"""The four stages of the pipeline, each a module to run: `python -m stages.drift --help`."""

import os

# Threads that wait for work by spinning make two processes on the same cores 60 times slower, not two
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
