"""Settings that hold for every test."""

import os

# Before torch is loaded: see stages/__init__.py
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
