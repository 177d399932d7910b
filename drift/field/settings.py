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


# A knob that is missing here takes any value: the field computes them all, or no available value reads it.
_AVAILABLE = {
    "coupling": ("partial_two_sided", "row"),
    "drift_form": ("alg2_joint",),
    "dist_metric": ("l2",),
    "alg2_impl": ("logspace",),
    "sinkhorn_agg_kernel": (False,),
    "drift_unit_vec": (False,),
    "drift_tau_scale": (False,),
    "normalize_drift_theta": (True,),
    "normalization_scope": ("batch",),
    "uncond_weighting": ("affinity",),
    "self_in_scale": (True,),
    "vanilla": (False,),
}


def unsupported(settings: FieldSettings) -> str | None:
    """One line about the first knob with a value that the field cannot compute; None if there is none."""
    for knob, available in _AVAILABLE.items():
        value = getattr(settings, knob)
        if value not in available:
            return f"{knob} is {_as_yaml(value)}, which the field cannot compute: use {_either(available)}"
    return None


def _either(values: tuple[str | bool, ...]) -> str:
    return " or ".join(_as_yaml(value) for value in values)


def _as_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
