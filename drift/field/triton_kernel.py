"""The drifting field in Triton: one program per drift problem, with all of it on the chip.

What `drift/field/problems.py` does in steps that each write `[B, N, M]` or `[B, T, N, M]` to memory, three
kernels do from tiles of the vectors: the distances behind S; the sums behind lambda and the statistics; V.
Each computes the distances again instead of reading them. `beyond_triton` in `drift/field/settings.py` says
what is left to the reference. Where TRITON_INTERPRET=1 is in the environment before triton is imported, they
run on a CPU, for tests.

Shapes: a problem is one (class, location) with N generated, U unconditional and P positive vectors of C
channels, in blocks of BN, BU and BP rows, powers of two; C goes in tiles of BC. A matrix `[N, M]` is kept as
its three blocks, named with g, u and p.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from drift.field.coupling import REMOVED
from drift.field.distance import on_device
from drift.field.form import TINY
from drift.field.guidance import target_weights
from drift.field.problems import FeatureSet

CHANNELS = 32  # BC; like the number of warps a guess from what the compiler spills, not measured
SMALLEST_BLOCK = 16  # of rows, for tl.dot
TINY_MASS = tl.constexpr(TINY)


class TritonPasses:
    """The passes of `FieldPasses` over all drift problems of a feature set."""

    def __init__(self, features: FeatureSet):
        settings = features.settings
        self._of = features
        self._classes, _, self._locations, self._channels = features.x.shape
        # What an unconditional vector's weight multiplies its A with, and adds to its logits
        factor, addend = features.weight, torch.zeros_like(features.weight)
        if settings.uncond_weighting == "logit":
            factor, addend = (features.weight > 0).float(), features.weight.log().clamp_min(REMOVED)
        self._guidance = factor.contiguous(), addend.contiguous()
        self._temps = on_device(settings.temps, features.x)
        vectors = features.x, features.uncond, features.pos
        self._vectors = (
            *((v, v.stride(), v.shape[1]) for v in vectors),
            self._locations,
            self._channels,
            features.squared_distance_floor,
        )
        bn, bu, bp = (max(SMALLEST_BLOCK, triton.next_power_of_2(v.shape[1])) for v in vectors)
        self._options = {
            "SQUARES": settings.dist_metric == "l2_sq",
            "BN": bn,
            "BU": bu,
            "BP": bp,
            "BC": CHANNELS,
            "num_warps": 16 if bn * (bn + bu + bp) > 64 * 64 else 4,
        }
        self._coupling = {
            "TWO_SIDED": settings.coupling == "partial_two_sided",
            "MASK_SELF": settings.mask_self_neg,
        }

    def distance_sums(self) -> Tensor:
        """As `Chunk.distance_sums`, of all classes: `[2, Nc]`."""
        of = self._of
        n, settings = of.x.shape[1], of.settings
        with_self = settings.self_in_scale or not settings.mask_self_neg
        totals = of.weight.new_empty(self._classes, self._locations)
        _distance_sums[self._grid](
            *self._vectors, of.weight.contiguous(), totals, WITH_SELF=with_self, **self._options
        )
        counts = target_weights(of.weight, *of.counts).sum(dim=1) - (0 if with_self else 1)
        return torch.stack([totals.sum(dim=1), counts * (self._locations * n)])

    def fields(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """S^2 sum V_tau V_tau' over the vectors of each class `[Nc, T, T]`, and neighbours summed, `[T]`."""
        t = len(self._temps)
        products = scale.new_empty(self._classes, self._locations, t, t)
        neighbours = scale.new_empty(self._classes, self._locations, t)
        _fields[self._grid](
            *self._vectors, *self._kernel(scale), products, neighbours, **self._options, **self._coupling
        )
        return products.sum(dim=1), neighbours.sum(dim=(0, 1))

    def write(self, drift: Tensor, scale: Tensor, factors: Tensor) -> None:
        """Put the sum over temperatures of S V_tau, with factors `[Nc, T]`, into `[Nc, N, L, C]`."""
        _drift[self._grid](
            *self._vectors,
            *self._kernel(scale),
            factors.contiguous(),
            drift,
            drift.stride(),
            **self._options,
            **self._coupling,
        )

    @property
    def _grid(self) -> tuple[int]:
        return (self._classes * self._locations,)

    def _kernel(self, scale: Tensor) -> tuple:
        """What turns distances into A: 1 / (tau S sqrt(C)) `[Nc, T]`, guidance, and the least A."""
        widths = (scale * math.sqrt(self._channels))[:, None] * self._temps
        floor = math.sqrt(self._of.settings.affinity_floor)
        return (1 / widths).contiguous(), len(self._temps), *self._guidance, floor


@triton.jit
def _here(vectors, locations):
    """Of all `vectors`, those of this program's problem: where they begin, strides of N and C, how many."""
    start, strides, count = vectors
    problem = tl.program_id(0).to(tl.int64)
    start += (problem // locations) * strides[0] + (problem % locations) * strides[2]
    return start, strides[1], strides[3], count


@triton.jit
def _tile(vectors, channels, first, ROWS: tl.constexpr, BC: tl.constexpr):
    """Channels from the `first` on of a block of vectors, `[ROWS, BC]`; zero where there is none."""
    start, row_stride, channel_stride, count = vectors
    row, channel = tl.arange(0, ROWS)[:, None], first + tl.arange(0, BC)[None, :]
    there = (row < count) & (channel < channels)
    return tl.load(start + row * row_stride + channel * channel_stride, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _tiles(x, uncond, pos, C, first, BN: tl.constexpr, BU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """Channels of all vectors of a problem, around the mean of the generated ones."""
    g = _tile(x, C, first, BN, BC)
    centre = (tl.sum(g, axis=0) / x[3])[None, :]
    return g - centre, _tile(uncond, C, first, BU, BC) - centre, _tile(pos, C, first, BP, BC) - centre


@triton.jit
def _dot(a, b, total):
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _squared_norms(vectors, norms):
    return norms + tl.sum(vectors * vectors, axis=1)


@triton.jit
def _distances(squares, floor, SQUARES: tl.constexpr):
    squares = tl.maximum(squares, floor)
    return squares if SQUARES else tl.sqrt(squares)


@triton.jit
def _measure(
    x, uncond, pos, C, floor, WITH_TARGETS: tl.constexpr,
    SQUARES: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Distances from generated vectors, three blocks `[BN, .]`, and the inner products of all vectors.

    The products come in blocks gg, gu, gp, uu, up, pp; the last three are zero without WITH_TARGETS.
    """
    gg = tl.zeros([BN, BN], tl.float32)
    gu = tl.zeros([BN, BU], tl.float32)
    gp = tl.zeros([BN, BP], tl.float32)
    uu = tl.zeros([BU, BU], tl.float32)
    up = tl.zeros([BU, BP], tl.float32)
    pp = tl.zeros([BP, BP], tl.float32)
    g_norms = tl.zeros([BN], tl.float32)
    u_norms = tl.zeros([BU], tl.float32)
    p_norms = tl.zeros([BP], tl.float32)
    for first in range(0, C, BC):
        g, u, p = _tiles(x, uncond, pos, C, first, BN, BU, BP, BC)
        gg = _dot(g, tl.trans(g), gg)
        gu = _dot(g, tl.trans(u), gu)
        gp = _dot(g, tl.trans(p), gp)
        if WITH_TARGETS:
            uu = _dot(u, tl.trans(u), uu)
            up = _dot(u, tl.trans(p), up)
            pp = _dot(p, tl.trans(p), pp)
        g_norms = _squared_norms(g, g_norms)
        u_norms = _squared_norms(u, u_norms)
        p_norms = _squared_norms(p, p_norms)
    own = tl.arange(0, BN)[:, None] == tl.arange(0, BN)[None, :]
    dg = tl.where(own, 0.0, g_norms[:, None] + g_norms[None, :] - 2 * gg)
    du = g_norms[:, None] + u_norms[None, :] - 2 * gu
    dp = g_norms[:, None] + p_norms[None, :] - 2 * gp
    distances = _distances(dg, floor, SQUARES), _distances(du, floor, SQUARES), _distances(dp, floor, SQUARES)
    return distances, (gg, gu, gp, uu, up, pp)


@triton.jit
def _there(x, target, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which entries of a block are of a generated vector and a target."""
    return (tl.arange(0, ROWS) < x[3])[:, None] & (tl.arange(0, COLUMNS) < target[3])[None, :]


@triton.jit
def _finite(maxima):
    """Maxima of logits, zero where there is none."""
    return tl.where(maxima == float("-inf"), 0.0, maxima)


@triton.jit
def _log(sums):
    """Zero where nothing was summed."""
    return tl.log(tl.where(sums > 0, sums, 1.0))


@triton.jit
def _affinity(logits, there, row_potential, floor, TWO_SIDED: tl.constexpr):
    """A = exp(z_ij - f_i - g_j) of a block, where g takes the columns' part for TWO_SIDED."""
    potentials = row_potential[:, None]
    if TWO_SIDED:
        maxima = _finite(tl.max(logits, axis=0))
        columns = maxima + _log(tl.sum(tl.exp(logits - maxima[None, :]), axis=0))
        potentials = (potentials + columns[None, :]) / 2
    return tl.where(there, tl.maximum(tl.exp(logits - potentials), floor), 0.0)


@triton.jit
def _coefficients(
    x, uncond, pos, distances, inverse_width, factor, addend, floor,
    TWO_SIDED: tl.constexpr, MASK_SELF: tl.constexpr,
    BN: tl.constexpr, BU: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """R of one temperature (see `alg2_joint`) in three blocks, and A of the positives."""
    dg, du, dp = distances
    in_g, in_u, in_p = _there(x, x, BN, BN), _there(x, uncond, BN, BU), _there(x, pos, BN, BP)
    repel = in_g
    if MASK_SELF:
        repel = in_g & (tl.arange(0, BN)[:, None] != tl.arange(0, BN)[None, :])
    zg = tl.where(repel, -dg * inverse_width, float("-inf"))
    zu = tl.where(in_u, addend - du * inverse_width, float("-inf"))
    zp = tl.where(in_p, -dp * inverse_width, float("-inf"))

    maxima = tl.maximum(tl.maximum(tl.max(zg, axis=1), tl.max(zu, axis=1)), tl.max(zp, axis=1))
    maxima = _finite(maxima)
    shift = maxima[:, None]
    sums = tl.sum(tl.exp(zg - shift), axis=1) + tl.sum(tl.exp(zu - shift), axis=1)
    sums += tl.sum(tl.exp(zp - shift), axis=1)
    rows = maxima + _log(sums)

    to_g = _affinity(zg, in_g, rows, floor, TWO_SIDED)
    to_u = _affinity(zu, in_u, rows, floor, TWO_SIDED) * factor
    to_p = _affinity(zp, in_p, rows, floor, TWO_SIDED)
    neg_mass = (tl.sum(to_g, axis=1) + tl.sum(to_u, axis=1))[:, None]
    pos_mass = tl.sum(to_p, axis=1)[:, None]
    return (-to_g * pos_mass, -to_u * pos_mass, to_p * neg_mass), to_p


@triton.jit
def _distance_sums(
    x, uncond, pos, L, C, squared_floor, weights, totals, WITH_SELF: tl.constexpr,
    SQUARES: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sum of each problem's distances, those to unconditional vectors times their weight."""
    problem = tl.program_id(0)
    x, uncond, pos = _here(x, L), _here(uncond, L), _here(pos, L)
    distances, _products = _measure(x, uncond, pos, C, squared_floor, False, SQUARES, BN, BU, BP, BC)
    dg, du, dp = distances
    count = _there(x, x, BN, BN)
    if not WITH_SELF:
        count = count & (tl.arange(0, BN)[:, None] != tl.arange(0, BN)[None, :])
    total = tl.sum(tl.where(count, dg, 0.0)) + tl.sum(tl.where(_there(x, pos, BN, BP), dp, 0.0))
    total += tl.load(weights + problem // L) * tl.sum(tl.where(_there(x, uncond, BN, BU), du, 0.0))
    tl.store(totals + problem, total)


@triton.jit
def _fields(
    x, uncond, pos, L, C, squared_floor, inverse_widths, T, factors, addends, floor, products, neighbours,
    TWO_SIDED: tl.constexpr, MASK_SELF: tl.constexpr,
    SQUARES: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Inner products of each problem's fields R_tau G R_tau'^T, G of all its vectors; and neighbours."""
    problem = tl.program_id(0)
    of_class = problem // L
    products += problem.to(tl.int64) * T * T
    neighbours += problem.to(tl.int64) * T
    inverse_widths += of_class * T
    factor, addend = tl.load(factors + of_class), tl.load(addends + of_class)
    x, uncond, pos = _here(x, L), _here(uncond, L), _here(pos, L)
    distances, gram = _measure(x, uncond, pos, C, squared_floor, True, SQUARES, BN, BU, BP, BC)
    gg, gu, gp, uu, up, pp = gram
    for t in range(T):
        field, to_p = _coefficients(
            x, uncond, pos, distances, tl.load(inverse_widths + t), factor, addend, floor,
            TWO_SIDED, MASK_SELF, BN, BU, BP,
        )  # fmt: skip
        # (sum_j A_ij)^2 / sum_j A_ij^2, divided by the largest so that squares do not underflow
        relative = to_p / tl.maximum(tl.max(to_p, axis=1), TINY_MASS)[:, None]
        root = tl.sum(relative, axis=1) / tl.maximum(tl.sqrt(tl.sum(relative * relative, axis=1)), TINY_MASS)
        tl.store(neighbours + t, tl.sum(root * root))

        rg, ru, rp = field
        dual_g = _dot(rp, tl.trans(gp), _dot(ru, tl.trans(gu), tl.dot(rg, gg, input_precision="ieee")))
        dual_u = _dot(rp, tl.trans(up), _dot(ru, uu, tl.dot(rg, gu, input_precision="ieee")))
        dual_p = _dot(rp, pp, _dot(ru, up, tl.dot(rg, gp, input_precision="ieee")))
        tl.store(products + t * T + t, tl.sum(rg * dual_g) + tl.sum(ru * dual_u) + tl.sum(rp * dual_p))
        for s in range(t):
            other, _to_p = _coefficients(
                x, uncond, pos, distances, tl.load(inverse_widths + s), factor, addend, floor,
                TWO_SIDED, MASK_SELF, BN, BU, BP,
            )  # fmt: skip
            og, ou, op = other
            product = tl.sum(og * dual_g) + tl.sum(ou * dual_u) + tl.sum(op * dual_p)
            tl.store(products + t * T + s, product)
            tl.store(products + s * T + t, product)


@triton.jit
def _drift(
    x, uncond, pos, L, C, squared_floor, inverse_widths, T, factors, addends, floor,
    temp_factors, drift, drift_strides,
    TWO_SIDED: tl.constexpr, MASK_SELF: tl.constexpr,
    SQUARES: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The weighted sum of each problem's fields, as vectors."""
    of_class = tl.program_id(0) // L
    inverse_widths += of_class * T
    temp_factors += of_class * T
    factor, addend = tl.load(factors + of_class), tl.load(addends + of_class)
    drift, row_stride, channel_stride, count = _here((drift, drift_strides, x[2]), L)
    x, uncond, pos = _here(x, L), _here(uncond, L), _here(pos, L)
    distances, _products = _measure(x, uncond, pos, C, squared_floor, False, SQUARES, BN, BU, BP, BC)
    sum_g = tl.zeros([BN, BN], tl.float32)
    sum_u = tl.zeros([BN, BU], tl.float32)
    sum_p = tl.zeros([BN, BP], tl.float32)
    for t in range(T):
        field, _to_p = _coefficients(
            x, uncond, pos, distances, tl.load(inverse_widths + t), factor, addend, floor,
            TWO_SIDED, MASK_SELF, BN, BU, BP,
        )  # fmt: skip
        rg, ru, rp = field
        share = tl.load(temp_factors + t)
        sum_g += share * rg
        sum_u += share * ru
        sum_p += share * rp
    for first in range(0, C, BC):
        g, u, p = _tiles(x, uncond, pos, C, first, BN, BU, BP, BC)
        tile = _dot(sum_p, p, _dot(sum_u, u, tl.dot(sum_g, g, input_precision="ieee")))
        row, channel = tl.arange(0, BN)[:, None], first + tl.arange(0, BC)[None, :]
        place = drift + row * row_stride + channel * channel_stride
        tl.store(place, tile.to(drift.dtype.element_ty), mask=(row < count) & (channel < C))
