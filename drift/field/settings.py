"""The knobs of the drifting field, as one frozen object that knows nothing of files."""

from dataclasses import dataclass, replace
from typing import Literal, get_args, get_origin, get_type_hints

from drift.errors import one_of

FieldImpl = Literal["auto", "reference", "triton"]
"""What computes the field: `drift/field/problems.py` or `drift/field/triton_kernel.py`."""
TRITON_VECTORS = {"generated": 64, "positives": 64, "unconditional": 32}
"""The most for each class that the Triton kernel takes: with more, a problem does not fit on the chip."""
TRITON_SHARED_BYTES = 108 * 1024 + 256
"""Shared memory that the kernel needs at that size, as the compiler says; an A100 or H100 has it, a GPU of
compute capability 8.6, 8.9 or 12.0 does not."""


@dataclass(frozen=True, kw_only=True)
class FieldSettings:
    """How distances become a drift; the defaults are the release's.

    The fields are named as the top-level keys of `params.yaml`; what each one does, and the range of each
    number, is told in `drift/params.py`. Raises `ValueError` for a value that is none of the allowed ones.
    """

    coupling: Literal["row", "partial_two_sided", "sinkhorn"] = "partial_two_sided"
    drift_form: Literal["alg2_joint", "split"] = "alg2_joint"
    dist_metric: Literal["l2", "l2_sq"] = "l2"
    temps: tuple[float, ...] = (0.02, 0.05, 0.2)
    mask_self_neg: bool = True
    alg2_impl: Literal["logspace", "kernel"] = "logspace"
    sinkhorn_iters: int = 20
    sinkhorn_tolerance: float = 0.0
    sinkhorn_marginal: Literal["none", "weighted_cols", "post_guidance"] = "weighted_cols"
    sinkhorn_agg_kernel: bool = False
    drift_unit_vec: bool = False
    drift_tau_scale: bool = False
    normalize_drift_theta: bool = True
    normalization_scope: Literal["batch", "class"] = "batch"
    uncond_weighting: Literal["affinity", "logit"] = "affinity"
    affinity_floor: float = 1e-6
    self_in_scale: bool = True
    vanilla: bool = False
    negatives: Literal["self", "second_batch"] = "self"

    def __post_init__(self):
        for key, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal or kind is bool:
                one_of(key, getattr(self, key), *(get_args(kind) or (False, True)))
        if not self.temps or min(self.temps) <= 0:
            raise ValueError(f"temps = {self.temps}: allowed: temperatures above 0")
        for key, least in (("sinkhorn_iters", 1), ("sinkhorn_tolerance", 0), ("affinity_floor", 0)):
            if not getattr(self, key) >= least:
                raise ValueError(f"{key} = {getattr(self, key)}: allowed: {least} or more")

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


def contradiction(settings: FieldSettings) -> str | None:
    """One line about the first pair of knobs that cannot be computed together; None if there is none."""
    sinkhorn = settings.coupling == "sinkhorn"
    if sinkhorn and settings.alg2_impl == "kernel":
        return (
            "alg2_impl is kernel with coupling sinkhorn: scalings of kernels that underflow do not converge; "
            "use alg2_impl logspace"
        )
    if settings.sinkhorn_marginal == "post_guidance" and settings.drift_form == "alg2_joint":
        return (
            "sinkhorn_marginal is post_guidance with drift_form alg2_joint: only split has a plan of the "
            "negatives to reweight; use drift_form split or sinkhorn_marginal weighted_cols"
        )
    if settings.sinkhorn_agg_kernel and not sinkhorn:
        return (
            f"sinkhorn_agg_kernel is true with coupling {settings.coupling}: only sinkhorn averages kernels; "
            "use coupling sinkhorn or sinkhorn_agg_kernel false"
        )
    if settings.sinkhorn_agg_kernel and settings.drift_tau_scale:
        return (
            "drift_tau_scale is true with sinkhorn_agg_kernel true: an averaged kernel has no temperature; "
            "set one of them to false"
        )
    if settings.drift_unit_vec and settings.dist_metric == "l2_sq":
        return (
            "drift_unit_vec is true with dist_metric l2_sq: unit displacements are the gradient of l2 only; "
            "use dist_metric l2 or drift_unit_vec false"
        )
    return None


def unused(*rules: tuple[bool, str, str]) -> dict[str, str]:
    """The keys of all rules (whether it holds, why, keys with spaces between) that hold, each with why."""
    return {key: why for holds, why, keys in rules if holds for key in keys.split()}


def without_effect(settings: FieldSettings, unconditional: bool = True) -> dict[str, str]:
    """The knobs that change nothing beside the others, and why; values that are refused do not count.

    `unconditional`: whether there are such samples.
    """
    s, sinkhorn = settings, settings.coupling == "sinkhorn"
    row_of_split = s.coupling == "row" and s.drift_form == "split" and s.affinity_floor == 0
    return unused(
        (not unconditional, "unconditional is 0", "uncond_weighting sinkhorn_marginal"),
        (row_of_split, "rows are normalised after the coupling", "uncond_weighting"),
        (sinkhorn, "coupling is sinkhorn", "uncond_weighting affinity_floor"),
        (sinkhorn and (s.self_in_scale or s.vanilla), "coupling is sinkhorn", "mask_self_neg"),
        (not sinkhorn, f"coupling is {s.coupling}", "sinkhorn_iters sinkhorn_tolerance sinkhorn_marginal"),
        (len(s.temps) == 1, "there is one temperature", "sinkhorn_agg_kernel"),
        (s.normalize_drift_theta, "normalize_drift_theta is true", "drift_tau_scale"),
        (not s.mask_self_neg, "mask_self_neg is false", "self_in_scale"),
        (s.vanilla, "vanilla is true", "self_in_scale"),
        (s.negatives == "second_batch", "negatives is second_batch", "mask_self_neg self_in_scale"),
    )


def beyond_triton(
    settings: FieldSettings, *, generated: int, positives: int, unconditional: int
) -> str | None:
    """One line about the first thing that the Triton kernel does not do; None if it does it all."""
    for key, done in (
        ("coupling", ("partial_two_sided", "row")),
        ("drift_form", ("alg2_joint",)),
        ("alg2_impl", ("logspace",)),
        ("negatives", ("self",)),
        ("drift_unit_vec", (False,)),
    ):
        if (value := getattr(settings, key)) not in done:
            allowed = " or ".join(str(v).lower() for v in done)
            return f"the Triton kernel does not do {key} {str(value).lower()}: allowed: {allowed}"
    counts = {"generated": generated, "positives": positives, "unconditional": unconditional}
    for key, most in TRITON_VECTORS.items():
        if counts[key] > most:
            return f"the Triton kernel does not do {counts[key]} {key} per class: allowed: at most {most}"
    return None
