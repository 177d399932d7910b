"""Speed and memory, as ratios against a plain reference in the same run. Each module says how to run it."""

import os

# Threads that wait should not spin for long where other processes want the cores; see docs/log.md
os.environ.setdefault("GOMP_SPINCOUNT", "1500")
