"""The four stages of the pipeline, each a module to run: `python -m stages.drift --help`."""

import os

# OpenMP's threads spin for 300,000 rounds before they sleep, which makes two processes on the same cores up
# to 60 times slower instead of two; as many rounds as these cost nothing on idle cores (docs/log.md)
os.environ.setdefault("GOMP_SPINCOUNT", "1500")
