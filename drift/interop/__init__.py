"""Weights and formats of others."""

from drift.interop.release import import_prior_mae as import_sinkhorn_mae

__all__ = ["import_sinkhorn_mae"]
