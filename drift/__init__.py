"""Drifting models: one-step generators trained by a kernel field (arXiv 2602.04770, 2603.12366)."""

__version__ = "0.1.0"
