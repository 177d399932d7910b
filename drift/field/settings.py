"""The knobs of the drifting field, as one frozen object that knows nothing of files."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class FieldSettings:
    """How distances become a drift; the defaults are the release's.

    The fields are named as the top-level keys of `params.yaml`; what each one does is told in
    `drift/params.py`, where the values are checked.
    """

    coupling: str = "partial_two_sided"
    drift_form: str = "alg2_joint"
    dist_metric: str = "l2"
    temps: tuple[float, ...] = (0.02, 0.05, 0.2)
    mask_self_neg: bool = True
    alg2_impl: str = "logspace"
    sinkhorn_iters: int = 20
    sinkhorn_marginal: str = "weighted_cols"
    sinkhorn_agg_kernel: bool = False
    drift_unit_vec: bool = False
    drift_tau_scale: bool = False
    normalize_drift_theta: bool = True
    normalization_scope: str = "batch"
    uncond_weighting: str = "affinity"
    affinity_floor: float = 1e-6
    self_in_scale: bool = True
    vanilla: bool = False

    @classmethod
    def prior(cls, **changes) -> "FieldSettings":
        """The prior's conventions (arXiv 2603.12366), with `changes` on top."""
        base = cls(
            normalization_scope="class",
            uncond_weighting="logit",
            affinity_floor=0.0,
            self_in_scale=False,
        )
        return replace(base, **changes)
