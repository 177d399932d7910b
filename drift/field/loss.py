"""The drifting loss of one feature set: value, and gradient without an autograd graph (paper Alg. 1, 2).

Shapes: Nc classes, N generated, U unconditional and P positive samples for each, L locations, C channels,
T temperatures. One drift problem is one (class, location); see `drift/field/problems.py`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drift.errors import UserError, one_of
from drift.field.distance import GUARDS, feature_scale, on_device
from drift.field.guidance import unconditional_weight
from drift.field.problems import Chunk, Coefficients, FeatureSet, Measured
from drift.field.settings import (
    TRITON_SHARED_BYTES,
    FieldImpl,
    FieldSettings,
    beyond_triton,
    contradiction,
)

Reduce = Callable[[Tensor], Tensor]
"""Sums a 1-D float32 tensor over the processes that share the classes of a step."""

CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 2 * 2**30}
"""Memory for one chunk: on a CPU what stays in its caches, on a GPU what keeps it busy."""
KEEP_BYTES = {"cpu": 4 * 2**30, "cuda": 16 * 2**30}
"""Memory for what one pass over the chunks keeps for the next; beyond it, chunks are computed again."""
AUTO_IS_TRITON = False
"""Whether `auto` takes the Triton kernel where it can: not before it was measured to be the faster one."""


def drifting_loss(
    x: Tensor,
    pos: Tensor,
    uncond: Tensor,
    omega: Tensor,
    settings: FieldSettings,
    *,
    negatives: Tensor | None = None,
    reduce: Reduce | None = None,
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
    impl: FieldImpl = "reference",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The drifting loss of one feature set, and what it tells about the field (paper Alg. 1, A.6).

        loss = mean((x/S - stopgrad(x/S + V))^2)
        hence its value is mean(V^2), and dloss/dx = -2 V / (S numel(x))

    The mean is over classes, samples, locations and channels. All of it is computed in float32, whatever
    the inputs are and whether or not autocast is on; the gradient has the type of `x`. Short distances are
    small differences of inner products: leave `torch.set_float32_matmul_precision` at "highest".

    Args:
        x: generated vectors `[Nc, N, L, C]`; the loss can be differentiated in them, once.
        pos: vectors of real samples of the same class, `[Nc, P, L, C]`.
        uncond: vectors of real samples of any class, `[Nc, U, L, C]`; U may be 0.
        omega: CFG strength of each class, at least 1, `[Nc]`.
        settings: the knobs of the field.
        negatives: for `settings.negatives: second_batch`, vectors of other generated samples of the same
            class, `[Nc, K, L, C]`, which repel x in place of x itself.
        reduce: given where processes share the classes of a step. S, lambda and the statistics then
            belong to all of them; the loss is the mean over this process's classes, so that gradients
            averaged over processes (equal shares assumed) are those of one process with all classes.
        chunk_bytes, keep_bytes: memory bounds, see `CHUNK_BYTES` and `KEEP_BYTES`; they change the result
            by rounding only.
        impl: `triton` is another way to the same numbers, up to rounding, for the settings that
            `beyond_triton` lets pass; it has no use for those bounds. See also `takes_triton`.

    Returns:
        The loss and detached statistics, all over classes and locations: `loss`; `scale`, the feature scale
        S (its mean where each class has its own); per temperature `[T]` `drift_rms`, the RMS of V_tau
        before normalisation; `neighbours`, the effective number (sum_j A_ij)^2 / sum_j A_ij^2 of positives
        that attract one generated vector; for `sinkhorn` `marginal_error`, the L1 distance of both marginals
        of the plan from what they should be (for `split` that of the worse plan).

    Raises:
        UserError: two knobs contradict each other, or `impl` is `triton` where that cannot be.
        ValueError: `negatives` is given without `settings.negatives: second_batch`, or missing with it.
    """
    passes = FieldPasses(
        x,
        pos,
        uncond,
        omega,
        settings,
        negatives=negatives,
        chunk_bytes=chunk_bytes,
        keep_bytes=keep_bytes,
        impl=impl,
    )
    return passes.all(reduce or (lambda sums: sums))


def takes_triton(
    impl: FieldImpl,
    settings: FieldSettings,
    device: torch.device,
    *,
    generated: int,
    positives: int,
    unconditional: int,
) -> bool:
    """Whether the Triton kernel is to compute such a field; tensors need not be there yet.

    Raises:
        UserError: `impl` is `triton`, and the kernel does not do this, or not here.
    """
    if one_of("impl", impl, *get_args(FieldImpl)) == "reference" or (impl == "auto" and not AUTO_IS_TRITON):
        return False
    obstacle = beyond_triton(
        settings, generated=generated, positives=positives, unconditional=unconditional
    ) or _no_triton(device)
    if obstacle and impl == "triton":
        raise UserError(f"field_impl = triton: {obstacle}; set hardware.field_impl to reference")
    return not obstacle


def _no_triton(device: torch.device) -> str | None:
    """Why the kernel does not run here, in part of a line."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if triton.knobs.runtime.interpret:
        return None
    if device.type == "cuda":
        if (there := _shared_bytes(device)) < TRITON_SHARED_BYTES:
            return (
                f"the Triton kernel needs {TRITON_SHARED_BYTES} bytes of shared memory, this GPU has {there}"
            )
        return None
    return f"the Triton kernel needs a CUDA device, this is {device.type}"


def _shared_bytes(device: torch.device) -> int:
    """The most shared memory that one program on a CUDA device may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class Fields(NamedTuple):
    """What the fields V_tau of a feature set add up to."""

    products: Tensor
    """sum V_tau V_tau' over the vectors of each class, `[Nc, T, T]`."""
    neighbours: Tensor
    """Sum over vectors, `[T]`."""
    marginal_errors: Tensor
    """Sum over drift problems, `[T]`."""


class FieldPasses:
    """The passes over one feature set's drift problems: the fields need S, and V needs lambda.

    S and lambda belong to all classes of a step (`normalization_scope: batch`). Where those are seen part by
    part, each part has passes of its own: the total of their `distance_sums` gives S, that of their
    `field_sums` lambda. Arguments and errors are those of `drifting_loss`.
    """

    def __init__(
        self,
        x: Tensor,
        pos: Tensor,
        uncond: Tensor,
        omega: Tensor,
        settings: FieldSettings,
        *,
        negatives: Tensor | None = None,
        chunk_bytes: int | None = None,
        keep_bytes: int | None = None,
        impl: FieldImpl = "reference",
    ):
        if complaint := contradiction(settings):
            raise UserError(complaint)
        if (negatives is not None) != (settings.negatives == "second_batch"):
            raise ValueError(
                f"settings.negatives is {settings.negatives}, negatives are {type(negatives).__name__}"
            )
        assert omega.shape == x.shape[:1], f"{tuple(omega.shape)} strengths for {len(x)} classes"
        self.x, self.settings = x, settings
        self._device = x.device.type
        self._guards = GUARDS[settings.normalization_scope]
        self._numel = x.new_full((), x.numel(), dtype=torch.float32)
        with self._in_float32():
            u = uncond.shape[1]
            repelling = x.shape[1] - 1 if negatives is None else negatives.shape[1]
            features = FeatureSet(
                x,
                negatives,
                uncond,
                pos,
                omega.float(),
                unconditional_weight(omega, repelling, u),
                settings,
                self._guards.squared_distance,
            )
        self._temps, self._fields = len(settings.temps), features.fields
        self._chunks: list[_Kept] = []
        self._triton = None
        n, p = x.shape[1], pos.shape[1]
        if takes_triton(impl, settings, x.device, generated=n, positives=p, unconditional=u):
            from drift.field.triton_kernel import TritonPasses

            self._triton = TritonPasses(features)
            return
        if chunk_bytes is None:
            chunk_bytes = CHUNK_BYTES.get(self._device, CHUNK_BYTES["cuda"])
        room = KEEP_BYTES.get(self._device, KEEP_BYTES["cuda"]) if keep_bytes is None else keep_bytes
        for chunk in features.chunks(max(1, chunk_bytes // features.working_bytes)):
            room -= chunk.problems * features.kept_bytes
            self._chunks.append(_Kept(chunk, keep=room >= 0))

    def all(self, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        """What `drifting_loss` returns, where these are all classes of this process in the step."""
        per_class = self.settings.normalization_scope == "class"
        with self._in_float32():
            sums = self.distance_sums()
            scale = self.scale(sums if per_class else reduce(sums.sum(dim=1)))
            fields = self._fields_at(scale)
            total = reduce(self._packed(fields, scale))
            factors = self._class_factors(fields, scale) if per_class else self.factors(total)
            value = _loss(factors, fields.products) / self._numel
        return self.loss(scale, factors, value), self.statistics(total)

    def distance_sums(self) -> Tensor:
        """Numerator and denominator of the mean distance behind S, of each class: `[2, Nc]`."""
        sums = self.x.new_zeros(2, len(self.x), dtype=torch.float32)
        if self.settings.vanilla:
            return sums
        with self._in_float32():
            if self._triton is not None:
                return self._triton.distance_sums()
            for kept in self._chunks:
                measured = kept.chunk.measure()
                sums[:, kept.chunk.classes] += kept.chunk.distance_sums(measured.distances)
                if kept.keep:
                    kept.measured = measured
        return sums

    def scale(self, sums: Tensor) -> Tensor:
        """S of each class `[Nc]`, from `distance_sums` `[2, Nc]` or their total `[2]`."""
        if self.settings.vanilla:
            return self.x.new_ones(len(self.x), dtype=torch.float32)
        scale = feature_scale(sums[0] / sums[1], self.x.shape[-1], self._guards.scale)  # mean(d) / sqrt(C)
        return scale.expand(len(self.x))

    def field_sums(self, scale: Tensor) -> Tensor:
        """What `factors` and `statistics` need of the fields at S `[Nc]`, a vector; it adds up over parts."""
        with self._in_float32():
            return self._packed(self._fields_at(scale), scale)

    def factors(self, sums: Tensor) -> Tensor:
        """What every V_tau is multiplied by in V, from the total of `field_sums`: `[1, T]`."""
        totals = self._unpacked(sums)
        with self._in_float32():
            return self._factors(totals.products / totals.numel, totals.scale / totals.classes)[None]

    def loss(self, scale: Tensor, factors: Tensor, value: Tensor | None = None) -> Tensor:
        """The loss of these classes at S `[Nc]` and `factors` `[Nc or 1, T]`; see `drifting_loss`.

        `value` is its value where that is known already.
        """
        with self._in_float32():
            drift = torch.empty_like(self.x)  # half the memory where the gradient is half precise
            factors = factors.expand(len(self.x), self._fields) / scale[:, None]
            if self._triton is not None:
                self._triton.write(drift, scale, factors)
            for kept in self._chunks:
                kept.chunk.write(drift, kept.take(scale), factors)
            if value is None:
                value = torch.linalg.vector_norm(drift, dtype=torch.float32).square() / self._numel
            slope = (-2 / (scale * self._numel))[:, None, None, None]
        return _KnownGradient.apply(self.x, value, drift, slope)

    def statistics(self, sums: Tensor) -> dict[str, Tensor]:
        """The statistics of `drifting_loss` from the total of `field_sums`."""
        totals, settings = self._unpacked(sums), self.settings
        _, n, _, channels = self.x.shape
        loss = totals.loss
        if settings.normalization_scope == "batch":
            factors = self.factors(sums)
            with self._in_float32():
                loss = _loss(factors, totals.products)
        mean_products = totals.products / totals.numel
        statistics = {
            "loss": loss / totals.numel,
            "scale": totals.scale / totals.classes,
            "drift_rms": mean_products.diagonal().clamp_min(0).sqrt().expand(self._temps),
            "neighbours": (totals.neighbours / totals.numel * channels).expand(self._temps),
        }
        if settings.coupling == "sinkhorn":
            mean_errors = totals.marginal_errors / totals.numel * (channels * n)
            statistics["marginal_error"] = mean_errors.expand(self._temps)
        return statistics

    def _fields_at(self, scale: Tensor) -> Fields:
        classes, t = len(self.x), self._fields
        products = self.x.new_zeros(classes, t, t, dtype=torch.float32)
        neighbours, marginal_errors = self.x.new_zeros(2, t, dtype=torch.float32)
        if self._triton is not None:
            products, neighbours = self._triton.fields(scale)
        for kept in self._chunks:
            measured = kept.measure()
            coefficients = kept.chunk.coefficients(measured.distances, scale)
            made, chunk_products = kept.chunk.inner_products(coefficients, measured)
            products[kept.chunk.classes] += chunk_products
            neighbours += coefficients.neighbours.sum(dim=(0, 2))
            if coefficients.marginal_error is not None:
                marginal_errors += coefficients.marginal_error.sum(dim=0)
            if kept.keep:
                kept.made = made
        return Fields(products / scale.square()[:, None, None], neighbours, marginal_errors)

    def _class_factors(self, fields: Fields, scale: Tensor) -> Tensor:
        return self._factors(fields.products * (len(self.x) / self._numel), scale)  # [Nc, T]

    def _factors(self, mean_products: Tensor, scale: Tensor) -> Tensor:
        """What V_tau is multiplied by in V, from mean(V_tau V_tau') `[*, T, T]` and S `[*]`: `[*, T]`."""
        settings = self.settings
        mean_squares = mean_products.diagonal(dim1=-2, dim2=-1)
        if settings.normalize_drift_theta:
            floor = self._guards.mean_square
            if settings.coupling == "sinkhorn" and settings.drift_form == "alg2_joint":
                floor /= self.x.shape[1] ** 4  # rows of a plan hold 1/N, those of other couplings about 1
            if settings.dist_metric == "l2_sq":
                floor = floor / scale[..., None]  # V_tau is 1/length then
            factors = mean_squares.clamp_min(floor).rsqrt()
        elif settings.drift_tau_scale:
            # |d log K / d d| = 1 / (tau sqrt(C)), and twice d more of it for squares
            power = 2 if settings.dist_metric == "l2_sq" else 1
            factors = power / (on_device(settings.temps, mean_squares) * math.sqrt(self.x.shape[-1]))
            factors = factors.expand_as(mean_squares)
        else:
            factors = torch.ones_like(mean_squares)
        return factors * (self._temps // self._fields)  # temperatures that share a field

    def _packed(self, fields: Fields, scale: Tensor) -> Tensor:
        loss = self._numel.new_zeros(())
        if self.settings.normalization_scope == "class":
            loss = _loss(self._class_factors(fields, scale), fields.products)
        products = fields.products.sum(dim=0).flatten()
        scalars = torch.stack([self._numel, loss, scale.sum(), scale.new_full((), len(scale))])
        return torch.cat([scalars, products, fields.neighbours, fields.marginal_errors])

    def _unpacked(self, sums: Tensor) -> "_Totals":
        t = self._fields
        scalars, products, neighbours, marginal_errors = sums.split([4, t * t, t, t])
        return _Totals(*scalars, products.view(t, t), neighbours, marginal_errors)

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        with torch.no_grad(), torch.autocast(self._device, enabled=False):
            yield


class _Totals(NamedTuple):
    """`field_sums` by name."""

    numel: Tensor
    """Numbers in one V_tau."""
    loss: Tensor
    """Sum of V^2, for `normalization_scope: class`."""
    scale: Tensor
    classes: Tensor
    products: Tensor
    neighbours: Tensor
    marginal_errors: Tensor


@dataclass
class _Kept:
    """A chunk on its way through the passes, with what is kept of it in between."""

    chunk: Chunk
    keep: bool
    measured: Measured | None = None
    """From the first pass to the second."""
    made: Tensor | Coefficients | None = None
    """What V is a weighted sum of, from the second pass to the third."""

    def measure(self) -> Measured:
        measured, self.measured = self.measured or self.chunk.measure(), None
        return measured

    def take(self, scale: Tensor) -> Tensor | Coefficients:
        made, self.made = self.made, None
        if made is None:  # in the same way as before, so that keeping changes no bit
            measured = self.chunk.measure()
            coefficients = self.chunk.coefficients(measured.distances, scale)
            made, _ = self.chunk.inner_products(coefficients, measured)
        return made


def _loss(factors: Tensor, products: Tensor) -> Tensor:
    """Sum of V^2 from factors `[*, T]` and sums of V_tau V_tau' `[*, T, T]`."""
    return (factors[..., None, :] @ products @ factors[..., None]).sum()


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient in `x` is known to be `slope * drift`."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, drift: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(drift, slope)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient: Tensor):
        drift, slope = ctx.saved_tensors
        return (drift.float() * (slope * loss_gradient)).to(drift.dtype), None, None, None
