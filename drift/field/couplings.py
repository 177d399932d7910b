"""Couplings: from logits to non-negative weights A between generated vectors and targets.

Each is one frozen object in `COUPLINGS` that owns its options. To add one, write a class with `@register`:
settings, command line and tests find it by its name.

Shapes: B drift problems, T temperatures, N generated vectors and M targets. Logits z are `[B, T, N, M]`; a
pair that is masked has the logit -inf.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from drift.field.settings import FieldSettings

MAXIMA_RANGE = 160.0  # of logits: a quarter of it to either side is well within a float's exponents
ITERATIONS_PER_KERNEL = 5
KERNEL_RANGE = 20.0  # of the potentials: what underflows in the kernel then stays below 1e-20 of a plan
REMOVED = -1e30  # potential of a target that is not there: its kernel is zero at any temperature
TINY = 1e-30  # keeps quotients of masses that have all underflowed finite
KERNEL_SUM_FLOOR = 1e-12  # Sinkhorn paper's code: of the sums of exponentiated logits


class Plan(NamedTuple):
    """What a coupling makes of logits."""

    weights: Tensor
    """A or its normalised rows, `[B, T, N, M]`."""
    statistics: dict[str, Tensor]
    """By the names in `Coupling.statistics`, `[B, T]` each."""


@dataclass(frozen=True, kw_only=True)
class Coupling(ABC):
    """From logits to weights. The fields of a subclass are its options."""

    name: ClassVar[str]
    transport: ClassVar[bool] = False
    """Whether A is a transport plan: rows hold 1/N, and the weight of an unconditional target is a marginal.
    For others that weight is a factor of A or a logit."""
    statistics: ClassVar[tuple[str, ...]] = ()
    """What `Plan.statistics` tells beside the weights, for logs and plots."""

    @property
    def normalises(self) -> bool:
        """Whether `normalised_rows` sum to one."""
        return True

    @classmethod
    def options(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))

    @classmethod
    def contradictions(cls, settings: "FieldSettings") -> Iterator[str]:
        """A line about each setting that this coupling cannot be combined with."""
        yield from ()

    @abstractmethod
    def plan(self, logits: Tensor, marginal: Tensor) -> Plan:
        """A for logits, which it may overwrite; column marginals are proportional to `marginal` `[B, M]`."""

    @abstractmethod
    def normalised_rows(self, logits: Tensor, marginal: Tensor) -> Plan:
        """A divided by its row sums, also where those are too small for a float."""


COUPLINGS: dict[str, type[Coupling]] = {}


def register(name: str) -> Callable[[type[Coupling]], type[Coupling]]:
    """Make a coupling known under a name."""

    def add(kind: type[Coupling]) -> type[Coupling]:
        kind.name = name
        COUPLINGS[name] = kind
        return kind

    return add


@dataclass(frozen=True, kw_only=True)
class Softmax(Coupling):
    """Couplings by one normalisation, without iterations."""

    alg2_impl: Literal["logspace", "kernel"] = "logspace"
    affinity_floor: float = 1e-6

    def plan(self, logits: Tensor, marginal: Tensor) -> Plan:
        affinity = self._affinity(logits) if self.alg2_impl == "logspace" else self._from_kernel(logits.exp())
        return Plan(affinity.clamp_min_(math.sqrt(self.affinity_floor)), {})

    def normalised_rows(self, logits: Tensor, marginal: Tensor) -> Plan:
        if self.affinity_floor == 0 and self.alg2_impl == "logspace":
            return Plan((logits + self._column_potentials(logits)).softmax(dim=-1), {})
        affinity = self.plan(logits, marginal).weights
        return Plan(affinity / affinity.sum(dim=-1, keepdim=True).clamp_min(TINY), {})

    @abstractmethod
    def _affinity(self, logits: Tensor) -> Tensor: ...

    @abstractmethod
    def _from_kernel(self, kernel: Tensor) -> Tensor:
        """A from K = exp(logits), whose rows may underflow to zero (`alg2_impl: kernel`)."""

    @abstractmethod
    def _column_potentials(self, logits: Tensor) -> Tensor | float:
        """g for which A is exp(z_ij + g_j) up to a factor of each row."""


@register("row")
class Row(Softmax):
    """A = softmax of each generated vector over its targets.

    A_ij = K_ij / sum_j K_ij,  K = exp(logits)
    """

    def _affinity(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)

    def _from_kernel(self, kernel: Tensor) -> Tensor:
        return kernel / kernel.sum(dim=-1, keepdim=True).clamp_min(KERNEL_SUM_FLOOR)

    def _column_potentials(self, logits: Tensor) -> float:
        return 0.0


@register("partial_two_sided")
class PartialTwoSided(Softmax):
    """Geometric mean of the softmax over targets and that over generated vectors (paper Alg. 2).

    A_ij = K_ij / sqrt(sum_j K_ij sum_i K_ij),  K = exp(logits)
    """

    def _affinity(self, logits: Tensor) -> Tensor:
        if logits.device.type == "cpu" and not torch.compiler.is_compiling():
            affinity = _two_sided_by_one_exponential(logits)
            if affinity is not None:
                return affinity
        potentials = logits.logsumexp(dim=-1, keepdim=True) + logits.logsumexp(dim=-2, keepdim=True)
        return (logits - potentials / 2).exp()

    def _from_kernel(self, kernel: Tensor) -> Tensor:
        rows, columns = (kernel.sum(dim=d, keepdim=True).clamp_min(KERNEL_SUM_FLOOR) for d in (-1, -2))
        return kernel * rows.rsqrt() * columns.rsqrt()

    def _column_potentials(self, logits: Tensor) -> Tensor:
        return logits.logsumexp(dim=-2, keepdim=True) / -2


def _two_sided_by_one_exponential(logits: Tensor) -> Tensor | None:
    """A of `partial_two_sided`, faster on a CPU; None where maxima lie too far apart for floats.

    With row maxima r_i and column maxima c_j, all of it comes from one exponential that cannot overflow,
    B_ij = exp(z_ij - (r_i + c_j) / 2) <= 1:

        sum_j K_ij = e^(r_i / 2) sum_j B_ij e^(c_j / 2),  and so for columns
    """
    row_max, column_max = logits.amax(dim=-1, keepdim=True), logits.amax(dim=-2, keepdim=True)
    top = torch.maximum(row_max.amax(dim=-2, keepdim=True), column_max.amax(dim=-1, keepdim=True))
    bottom = torch.minimum(row_max.amin(dim=-2, keepdim=True), column_max.amin(dim=-1, keepdim=True))
    if not (top - bottom).max() <= MAXIMA_RANGE:
        return None
    rows, columns = ((maxima - (top + bottom) / 2).div_(2) for maxima in (row_max, column_max))
    kernel = (logits - (top + bottom) / 2).sub_(rows).sub_(columns).exp_()  # B
    rows, columns = rows.exp_(), columns.exp_()
    # K = rows B columns, so that A = B sqrt(rows / (B columns)) sqrt(columns / (B^T rows))
    row_factors = (rows / (kernel @ columns.mT)).sqrt_()
    return kernel.mul_((columns / (rows.mT @ kernel)).sqrt_()).mul_(row_factors)


@dataclass(frozen=True, kw_only=True)
class Transport(Coupling):
    """Entropic transport by log-space scalings; see `Sinkhorn` and `Unbalanced`.

    With `sinkhorn_iters` 0, A_ij = K_ij b_j / N: the kernel by the marginals alone. The split form then
    follows the gradient of the maximum mean discrepancy (MMD) of the kernel K.
    """

    transport: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = ("marginal_error",)
    sinkhorn_iters: int = 20
    sinkhorn_tolerance: float = 0.0

    @classmethod
    def contradictions(cls, settings: "FieldSettings") -> Iterator[str]:
        if settings.alg2_impl == "kernel":
            yield (
                f"alg2_impl is kernel with coupling {cls.name}: scalings of kernels that underflow do not "
                "converge; use alg2_impl logspace"
            )
        if settings.sinkhorn_marginal == "post_guidance" and settings.drift_form == "alg2_joint":
            yield (
                "sinkhorn_marginal is post_guidance with drift_form alg2_joint: only split has a plan of the "
                "negatives to reweight; use drift_form split or sinkhorn_marginal weighted_cols"
            )
        if settings.sinkhorn_iters:
            return
        if settings.drift_form == "alg2_joint":
            yield (
                "sinkhorn_iters is 0 with drift_form alg2_joint: products of masses that nothing normalises "
                "follow no discrepancy; use drift_form split or sinkhorn_iters 1"
            )
        elif settings.sinkhorn_marginal != "weighted_cols" and settings.guidance == "distribution":
            yield (
                f"sinkhorn_iters is 0 with sinkhorn_marginal {settings.sinkhorn_marginal}: nothing makes the "
                "weights of negatives as large as those of positives; use sinkhorn_marginal weighted_cols, "
                "guidance velocity or sinkhorn_iters 1"
            )

    @property
    def normalises(self) -> bool:
        return self.sinkhorn_iters > 0

    @property
    def relaxation(self) -> float:
        """What each update of a potential is multiplied by; 1 keeps the marginals."""
        return 1.0

    def plan(self, logits: Tensor, marginal: Tensor) -> Plan:
        potentials, log_marginal = self._scale(logits, marginal)
        plan = (logits + potentials.g).add_(potentials.f).exp_()
        return Plan(plan, self._errors(plan, log_marginal))

    def normalised_rows(self, logits: Tensor, marginal: Tensor) -> Plan:
        """A softmax over targets: f is the same in a whole row, and cancels when the row is divided.

        Without iterations, A is divided by what a row of a plan holds.
        """
        potentials, log_marginal = self._scale(logits, marginal)
        plan = (logits + potentials.g).add_(potentials.f).exp_()
        rows = (logits + potentials.g).softmax(dim=-1) if self.normalises else plan * plan.shape[-2]
        return Plan(rows, self._errors(plan, log_marginal))

    def _errors(self, plan: Tensor, log_marginal: Tensor) -> dict[str, Tensor]:
        """`sum_i |sum_j A_ij - 1/N| + sum_j |sum_i A_ij - b_j|`, `[B, T]`."""
        row_error = (plan.sum(dim=-1) - 1 / plan.shape[-2]).abs().sum(dim=-1)
        column_error = (plan.sum(dim=-2) - log_marginal[:, :, 0].exp()).abs().sum(dim=-1)
        return {"marginal_error": row_error + column_error}

    def _scale(self, logits: Tensor, marginal: Tensor) -> tuple["Potentials", Tensor]:
        """Potentials after the iterations, and log b `[B, 1, 1, M]`."""
        log_marginal = (marginal / marginal.sum(dim=-1, keepdim=True)).log()[:, None, None]
        if not self.normalises:
            f = logits.new_full((), -math.log(logits.shape[-2]))
            return Potentials(f, log_marginal, torch.zeros_like(f, dtype=torch.bool)), log_marginal
        start = Potentials(
            f=logits.new_full((*logits.shape[:-1], 1), math.inf),  # so that nothing is done before the first
            g=torch.where(log_marginal == -math.inf, REMOVED, torch.zeros_like(logits[..., :1, :])),
            done=torch.zeros_like(logits[..., :1, :1], dtype=torch.bool),
        )
        by_kernel = logits.device.type == "cpu" and not torch.compiler.is_compiling()
        now, step = self._iterate(start, 1, log_marginal, _log_sums(logits)), 1
        while step < self.sinkhorn_iters and not (self.sinkhorn_tolerance > 0 and now.done.all()):
            count = min(ITERATIONS_PER_KERNEL, self.sinkhorn_iters - step)
            after = None
            if by_kernel:
                after = self._iterate(now, count, log_marginal, _log_sums_by_kernel(logits, now))
                moved = torch.maximum((after.f - now.f).abs().amax(), (after.g - now.g).abs().amax())
                # Not a number where a row of the kernel has underflowed
                after = after if moved < KERNEL_RANGE else None
            now = after or self._iterate(now, count, log_marginal, _log_sums(logits))
            step += count
        return now, log_marginal

    def _iterate(
        self, now: "Potentials", count: int, log_marginal: Tensor, log_sums: "LogSums"
    ) -> "Potentials":
        """`count` times a row update, then a column update.

            f_i = r (log(1/N) - log sum_j exp(z_ij + g_j)),  g_j = r (log b_j - log sum_i exp(z_ij + f_i))

        with r the relaxation.
        """
        f, g, done = now
        for _ in range(count):
            next_f = self.relaxation * (-math.log(f.shape[-2]) - log_sums(g, -1))
            if self.sinkhorn_tolerance > 0:
                # The row sums of exp(z + f + g) are exp(f - next_f) / N
                error = ((f - next_f).exp() - 1).abs().mean(dim=-2, keepdim=True)
                done = done | (error <= self.sinkhorn_tolerance)
                next_f = torch.where(done, f, next_f)
            next_g = self.relaxation * (log_marginal - log_sums(next_f, -2)).clamp_min_(REMOVED)
            f, g = next_f, torch.where(done, g, next_g) if self.sinkhorn_tolerance > 0 else next_g
        return Potentials(f, g, done)


@register("sinkhorn")
@dataclass(frozen=True, kw_only=True)
class Sinkhorn(Transport):
    """Balanced entropic optimal transport (arXiv 2603.12366): columns are exact, rows converge."""


@register("unbalanced")
@dataclass(frozen=True, kw_only=True)
class Unbalanced(Transport):
    """Entropic transport whose marginals are held by KL penalties of strength rho, not exactly.

    A minimises <cost, A> / tau + sum A (log A - 1) + rho (KL(A 1 | 1/N) + KL(A^T 1 | b)) with the cost in
    units of S sqrt(C); each potential is then damped by rho / (1 + rho) (Chizat et al., arXiv 1607.05816).
    rho to infinity is `sinkhorn`; with a small rho, vectors that are far from every target send little mass.
    """

    rho: float = 10.0

    @classmethod
    def contradictions(cls, settings: "FieldSettings") -> Iterator[str]:
        yield from super().contradictions(settings)
        if settings.sinkhorn_tolerance > 0:
            yield (
                "sinkhorn_tolerance is not 0 with coupling unbalanced: its marginals never become exact; "
                "set sinkhorn_tolerance to 0"
            )
        if settings.sinkhorn_iters == 0:
            yield (
                "sinkhorn_iters is 0 with coupling unbalanced: no marginal is held then, whatever rho; use "
                "coupling sinkhorn or sinkhorn_iters 1"
            )
        rho = settings.options.get("rho", cls.rho)
        if not 0 < rho < math.inf:
            yield f"rho = {rho}: allowed: above 0"

    @property
    def relaxation(self) -> float:
        return self.rho / (1 + self.rho)


class Potentials(NamedTuple):
    """Where the iterations of a transport are: A = exp(z + f + g)."""

    f: Tensor
    """`[B, T, N, 1]`"""
    g: Tensor
    """`[B, T, 1, M]`"""
    done: Tensor
    """Whether a (problem, temperature) has stopped, `[B, T, 1, 1]`."""


LogSums = Callable[[Tensor, int], Tensor]
"""(g, -1) -> log sum_j exp(z_ij + g_j);  (f, -2) -> log sum_i exp(z_ij + f_i)."""


def _log_sum(logits: Tensor, potential: Tensor, dim: int) -> Tensor:
    return (logits + potential).logsumexp(dim=dim, keepdim=True)


_fastest_log_sum = _log_sum


def fuse(compile: Callable[[Callable], Callable] = torch.compile) -> None:
    """Let `compile` fuse each sum of a scaling, from now on in this process (`hardware.compile`).

    A GPU then reads the logits once for a sum. On a CPU the products with kernels below are as fast.
    """
    global _fastest_log_sum
    _fastest_log_sum = compile(_log_sum)


def _log_sums(logits: Tensor) -> LogSums:
    return lambda potential, dim: _fastest_log_sum(logits, potential, dim)


def _log_sums_by_kernel(logits: Tensor, around: Potentials) -> LogSums:
    """The same near given potentials, by products with K = exp(z + f + g): one exponential for many sums."""
    kernel = (logits + around.g).add_(around.f).exp_()

    def log_sums(potential: Tensor, dim: int) -> Tensor:
        if dim == -1:
            return (kernel @ (potential - around.g).exp().mT).log() - around.f
        return ((potential - around.f).exp().mT @ kernel).log() - around.g

    return log_sums
