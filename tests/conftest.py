"""Settings that hold for every test."""

import os
import signal

# Before torch is loaded: see stages/__init__.py
os.environ.setdefault("GOMP_SPINCOUNT", "1500")

# Processes started by nohup or in the background of a script are born deaf to these, and so are their children;
# tests send them to commands
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
