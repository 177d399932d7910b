"""Settings that hold for every test."""

import os

# Before torch is loaded: see stages/__init__.py
os.environ.setdefault("GOMP_SPINCOUNT", "1500")
