"""The settings of the drifting field, as one frozen object that knows nothing of files."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

from drift.field.couplings import COUPLINGS, Coupling
from drift.runtime.errors import one_of


class Guards(NamedTuple):
    """Lower bounds that keep degenerate features, such as constant ones, from dividing by zero."""

    squared_distance: float
    scale: float
    """Of S."""
    mean_square: float
    """Of mean(V_tau^2), the square of lambda."""


GUARDS = {
    "release": Guards(1e-8, 1e-3, 1e-8),  # a vector is 1e-4 from itself, lambda_tau >= 1e-4
    "sinkhorn": Guards(0.0, 1e-6, 1e-12),
    "wflow": Guards(0.0, 1e-3, 1e-8),
}
"""By `conventions`, as each code has them."""


@dataclass(frozen=True, kw_only=True)
class FieldSettings:
    """How distances become a drift. The defaults are the release's; `of` starts from another code's.

    Raises `ValueError` for a value that is not allowed, and for an option that the coupling does not have.
    """

    conventions: Literal["release", "sinkhorn", "wflow"] = "release"
    """Whose code the guards against division by zero, and the count behind the unconditional weight, follow.
    `FieldSettings.of` sets the other members that belong to it."""
    coupling: str = "partial_two_sided"
    """How logits become weights: a name in `drift.field.couplings.COUPLINGS`."""
    drift_form: Literal["alg2_joint", "split"] = "alg2_joint"
    """How weights become a drift: attraction and repulsion coupled together (paper Alg. 2), or apart."""
    dist_metric: Literal["l2", "l2_sq"] = "l2"
    temps: tuple[float, ...] = (0.02, 0.05, 0.2)
    """Kernel temperatures tau."""
    negatives: Literal["self", "second_batch"] = "self"
    """What repels a generated sample: the others of its own batch, or an independent second one."""
    guidance: Literal["distribution", "velocity"] = "distribution"
    """Unconditional samples as weighted negatives (paper A.7), or by a field of their own that counts
    omega - 1 times (W-Flow; `split` only)."""
    mask_self_neg: bool = True
    """Keep a generated sample from being its own negative."""
    alg2_impl: Literal["logspace", "kernel"] = "logspace"
    """Of `row` and `partial_two_sided`: softmaxes, or exponentials first, which may underflow."""
    affinity_floor: float = 1e-6
    """Of A^2, for `row` and `partial_two_sided` (release)."""
    uncond_weighting: Literal["affinity", "logit"] = "affinity"
    """Where w enters for `row` and `partial_two_sided`: as a factor of A, or as log w in the logits."""
    sinkhorn_iters: int = 20
    """Of a plan. 0 leaves the kernel as it is, which makes the split form the gradient of an MMD."""
    sinkhorn_tolerance: float = 0.0
    """A drift problem stops earlier, once the L1 error of its row marginal is at most this; 0: never."""
    sinkhorn_marginal: Literal["none", "weighted_cols", "post_guidance"] = "weighted_cols"
    """Where w enters for plans: `none`, in the logits alone, which column scalings undo as they converge;
    `weighted_cols`, in the column marginal; `post_guidance`, omega after the iterations (`split` only)."""
    sinkhorn_agg_kernel: bool = False
    """Average the Gibbs kernels over the temperatures and scale once."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Options of the coupling that are not members of this class, such as `rho` of `unbalanced`."""
    drift_unit_vec: bool = False
    """Weighted unit displacements in place of displacements; `l2` only."""
    drift_tau_scale: bool = False
    """Multiply each V_tau by the slope of its log kernel; without effect under `normalize_drift_theta`."""
    normalize_drift_theta: bool = True
    """Divide each V_tau by its RMS lambda_tau."""
    normalization_scope: Literal["batch", "part", "class"] = "batch"
    """Over what S and lambda are taken: all classes of a step, `classes_per_part` of them, or each alone."""
    classes_per_part: int | None = None
    """Classes that follow each other and make a part, for that scope; None is all of one call (W-Flow: 2)."""
    self_in_scale: bool = True
    """Count the distance of a generated sample to itself in the mean distance behind S."""
    scale_statistic: Literal["mean", "rms", "mean_length"] = "mean"
    """S from the mean of the chosen distance; or a length for both metrics, from the RMS or the mean of the
    l2 distance."""
    generated_in_scale: bool = False
    """Count the distances among generated samples in S on top of those to what repels them (W-Flow)."""
    cost_factor: float = 1.0
    """What a distance is multiplied by in the logits; W-Flow's squared cost is half the square."""
    unit_scale: bool = False
    """S = 1."""
    feature_sets: Literal["sum", "mean"] = "sum"
    """How the losses of the feature sets add up; a gradient clip sees the difference."""

    def __post_init__(self):
        object.__setattr__(self, "temps", tuple(self.temps))
        for key, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal or kind is bool:
                one_of(key, getattr(self, key), *(get_args(kind) or (False, True)))
        one_of("coupling", self.coupling, *COUPLINGS)
        if not self.temps or min(self.temps) <= 0:
            raise ValueError(f"temps = {self.temps}: allowed: temperatures above 0")
        for key, least in (("sinkhorn_iters", 0), ("sinkhorn_tolerance", 0), ("affinity_floor", 0)):
            if not getattr(self, key) >= least:
                raise ValueError(f"{key} = {getattr(self, key)}: allowed: {least} or more")
        if self.classes_per_part is not None and self.classes_per_part < 1:
            raise ValueError(f"classes_per_part = {self.classes_per_part}: allowed: 1 or more, or None")
        if not self.cost_factor > 0:
            raise ValueError(f"cost_factor = {self.cost_factor}: allowed: above 0")
        taken = COUPLINGS[self.coupling].options()
        for name in self.options:
            if name not in taken:
                others = f"no option of coupling {self.coupling} ({', '.join(taken)})"
                raise ValueError(f"{name}: {others}, and no member of FieldSettings")

    @classmethod
    def of(cls, conventions: Literal["release", "sinkhorn", "wflow"], **changes) -> "FieldSettings":
        """The conventions of one code, with `changes` on top.

        The Sinkhorn paper's code never masks a plan's diagonal, and counts self-pairs in S only where
        masking is turned off. W-Flow's S is a mean distance, not its RMS, where the cost is not quadratic.
        """
        bundle = dict(CONVENTIONS[one_of("conventions", conventions, *CONVENTIONS)])
        if conventions == "sinkhorn":
            bundle["self_in_scale"] = not changes.get("mask_self_neg", True)
            if changes.get("coupling") == "sinkhorn":
                bundle["mask_self_neg"] = False
        if conventions == "wflow" and changes.get("dist_metric") == "l2":
            bundle |= {"scale_statistic": "mean", "cost_factor": 1.0}
        return cls(conventions=conventions, **{**bundle, **changes})

    @classmethod
    def sinkhorn(cls, **changes) -> "FieldSettings":
        """As in the code of Sinkhorn drifting (arXiv 2603.12366), with `changes` on top."""
        return cls.of("sinkhorn", **changes)

    @classmethod
    def wflow(cls, **changes) -> "FieldSettings":
        """As in W-Flow's code (arXiv 2605.11755), with `changes` on top."""
        return cls.of("wflow", **changes)

    @property
    def guards(self) -> Guards:
        return GUARDS[self.conventions]

    @property
    def scale_is_square(self) -> bool:
        """Whether S has the square of the vectors' unit, as a mean of squared distances has."""
        return self.dist_metric == "l2_sq" and self.scale_statistic == "mean"

    @property
    def fields(self) -> int:
        """How many different V_tau there are: one for each temperature, or one of an averaged kernel."""
        return 1 if self.sinkhorn_agg_kernel else len(self.temps)

    def coupling_object(self) -> Coupling:
        """The coupling with its options: members of its names, then `options`."""
        kind = COUPLINGS[self.coupling]
        members = {name for name in kind.options() if name in {f.name for f in dataclasses.fields(self)}}
        return kind(**{name: getattr(self, name) for name in members}, **self.options)


CONVENTIONS: dict[str, dict[str, object]] = {
    "release": {},
    "sinkhorn": {"normalization_scope": "class", "uncond_weighting": "logit", "affinity_floor": 0.0},
    "wflow": {
        "coupling": "sinkhorn",
        "drift_form": "split",
        "dist_metric": "l2_sq",
        "temps": (0.05,),
        "negatives": "second_batch",
        "guidance": "velocity",
        "sinkhorn_iters": 10,
        "normalization_scope": "part",
        "affinity_floor": 0.0,
        "scale_statistic": "rms",
        "generated_in_scale": True,
        "cost_factor": 0.5,
        "feature_sets": "mean",
    },
}
"""What each code does otherwise than the release, by name; see `FieldSettings.of`."""


def contradictions(settings: FieldSettings, generated: int | None = None) -> Iterator[str]:
    """A line about each pair of settings that cannot be computed together, with the way out.

    `generated`: how many samples of a class there are, where it is known.
    """
    kind = COUPLINGS[settings.coupling]
    yield from kind.contradictions(settings)
    masked = kind.transport and settings.mask_self_neg and settings.negatives == "self"
    if masked and settings.sinkhorn_iters and generated is not None and generated < 3:
        yield (
            f"mask_self_neg is true with coupling {settings.coupling} and {generated} generated samples: of "
            "them, each can be coupled to the other alone, however far it is; use 3 or more, negatives "
            "second_batch or mask_self_neg false"
        )
    if settings.sinkhorn_agg_kernel and not kind.transport:
        yield (
            f"sinkhorn_agg_kernel is true with coupling {settings.coupling}: only plans average kernels; "
            "use coupling sinkhorn or sinkhorn_agg_kernel false"
        )
    if settings.sinkhorn_agg_kernel and settings.drift_tau_scale:
        yield (
            "drift_tau_scale is true with sinkhorn_agg_kernel true: an averaged kernel has no temperature; "
            "set one of them to false"
        )
    if settings.drift_unit_vec and settings.dist_metric == "l2_sq":
        yield (
            "drift_unit_vec is true with dist_metric l2_sq: unit displacements are the gradient of l2 only; "
            "use dist_metric l2 or drift_unit_vec false"
        )
    if settings.guidance == "velocity" and settings.drift_form == "alg2_joint":
        yield (
            "guidance is velocity with drift_form alg2_joint: only split has a field of the unconditional "
            "samples alone; use drift_form split or guidance distribution"
        )


def unused(*rules: tuple[bool, str, str]) -> dict[str, str]:
    """Keys and reasons of the rules that hold. A rule: whether it holds, the reason, keys between spaces."""
    return {key: why for holds, why, keys in rules if holds for key in keys.split()}


def without_effect(settings: FieldSettings, unconditional: bool = True) -> dict[str, str]:
    """The settings that change nothing beside the others, and why. Contradictions are not looked for.

    `unconditional`: whether there are such samples.
    """
    s, plan, second = settings, COUPLINGS[settings.coupling].transport, settings.negatives == "second_batch"
    row_of_split = s.coupling == "row" and s.drift_form == "split" and s.affinity_floor == 0
    scope, no_sums = s.normalization_scope, s.unit_scale and not s.normalize_drift_theta
    return unused(
        (not unconditional, "unconditional is 0", "uncond_weighting sinkhorn_marginal guidance"),
        (s.guidance == "velocity", "guidance is velocity", "uncond_weighting sinkhorn_marginal"),
        (row_of_split, "rows are normalised after the coupling", "uncond_weighting"),
        (plan, f"coupling is {s.coupling}", "uncond_weighting affinity_floor"),
        (not plan, f"coupling is {s.coupling}", "sinkhorn_iters sinkhorn_tolerance sinkhorn_marginal"),
        (plan and s.sinkhorn_iters == 0, "sinkhorn_iters is 0", "sinkhorn_tolerance mask_self_neg"),
        (len(s.temps) == 1, "there is one temperature", "sinkhorn_agg_kernel"),
        (s.normalize_drift_theta, "normalize_drift_theta is true", "drift_tau_scale"),
        (s.unit_scale, "unit_scale is true", "self_in_scale generated_in_scale"),
        (s.unit_scale and s.dist_metric == "l2", "unit_scale is true", "scale_statistic"),
        (scope != "part", f"normalization_scope is {scope}", "classes_per_part"),
        (no_sums, "S and lambda are 1", "normalization_scope classes_per_part"),
        (second, "negatives is second_batch", "mask_self_neg"),
        (second and not s.generated_in_scale, "negatives is second_batch", "self_in_scale"),
    )
