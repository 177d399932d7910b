"""Speed and memory of the drifting loss against a plain one, at the shapes of a real step.

    python -m benchmarks.field [--classes 64] [--device cuda] [--json benchmarks/field.json]

`ours` is our loss with the release's conventions, `wflow` with W-Flow's: plans of 10 scalings at one
temperature, squared distances, velocity guidance, a second batch. Both leave out what only steps with a
line in the log compute. `vectorised` is Algorithm 2 of the paper, class by class, and `wflow_vectorised`
the same for W-Flow's field, each in multiples of ours. "time" is that of value and gradient, "extra" the
peak of the memory beyond the inputs. All figures of a table come from one run; read the ratios, not the
seconds. On a CPU fewer classes keep a row to seconds.
"""

import itertools
import math
import multiprocessing
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import geometric_mean, median

import torch
from torch import Tensor

from benchmarks.timing import GPU_OR_CPU, machine, parser, peak_memory, restart_peak, seconds_of, write
from drift.field import FieldSettings, drifting_loss

CLASSES, N, P, U = 64, 64, 64, 16
SHAPES = ((1024, 256), (256, 256), (64, 512), (16, 1024), (16, 2048), (1, 2048), (1, 4096))
"""(locations, channels) of the encoder's feature sets."""
TEMPS = FieldSettings().temps
WFLOW = FieldSettings.wflow(normalization_scope="class")  # a part of a step, of which each code has its own


def vectorised(x: Tensor, pos: Tensor, uncond: Tensor, omega: Tensor, _: Tensor) -> Tensor:
    """The drifting loss as Algorithm 2 says it, each class for all its locations at once."""
    n, u, channels = x.shape[1], uncond.shape[1], x.shape[3]
    of_class = [t.transpose(1, 2).unbind() for t in (x, pos, uncond)]  # of each class [L, *, C]
    targets = [torch.cat((c.detach(), u_c, p_c), dim=1) for c, p_c, u_c in zip(*of_class, strict=True)]
    mine = of_class[0]
    distances = [torch.cdist(c.detach(), y) for c, y in zip(mine, targets, strict=True)]
    weights = x.new_ones(len(x), n + u + P)
    weights[:, n : n + u] = (omega[:, None] - 1) * (n - 1) / u
    total = sum((d * w).sum() for d, w in zip(distances, weights, strict=True))
    scale = total / (weights.sum() * n * x.shape[2]) / math.sqrt(channels)

    mask = 100 * torch.eye(n, n + u + P, device=omega.device)
    drifts, mean_squares = {}, dict.fromkeys(TEMPS, x.new_zeros(()))
    for c, tau in itertools.product(range(len(x)), TEMPS):
        logits = -(distances[c] / (scale * math.sqrt(channels)) + mask) / tau
        affinity = (logits.softmax(dim=-1) * logits.softmax(dim=-2)).clamp(min=1e-6).sqrt() * weights[c]
        a_neg, a_pos = affinity[..., : n + u], affinity[..., n + u :]
        w_pos, w_neg = a_pos * a_neg.sum(dim=-1, keepdim=True), a_neg * a_pos.sum(dim=-1, keepdim=True)
        drifts[c, tau] = (w_pos @ targets[c][:, n + u :] - w_neg @ targets[c][:, : n + u]) / scale
        mean_squares[tau] = mean_squares[tau] + drifts[c, tau].square().mean() / len(x)

    losses = []
    for c, samples in enumerate(mine):
        drift = sum(drifts[c, tau] / mean_squares[tau].clamp(min=1e-8).sqrt() for tau in TEMPS)
        losses.append((samples / scale - (samples.detach() / scale + drift)).square().mean())
    return torch.stack(losses).mean()


def wflow_vectorised(x: Tensor, pos: Tensor, uncond: Tensor, omega: Tensor, negatives: Tensor) -> Tensor:
    """W-Flow's loss as its equations say it, each class for all its locations at once."""
    losses = []
    for samples, *targets, strength in zip(x, negatives, uncond, pos, omega - 1, strict=True):
        mine, second, u, p = (t.transpose(0, 1) for t in (samples, *targets))  # [L, *, C]
        now = mine.detach()
        counted = torch.cat((now, second, p), dim=1)
        scale = torch.cdist(now, counted).square().mean().sqrt() / math.sqrt(x.shape[3])
        to_second, to_u, to_p = (transported(now / scale, z / scale) for z in (second, u, p))
        drift = (to_p - to_second) + strength * (to_p - to_u)
        drift = drift / drift.square().mean().clamp(min=1e-8).sqrt()
        losses.append((mine / scale - (now / scale + drift)).square().mean())
    return torch.stack(losses).mean()


def transported(x: Tensor, y: Tensor) -> Tensor:
    """Means of `y [L, M, C]` by the rows of the plan from `x [L, N, C]`, scaled by log-sum-exp."""
    logits = -torch.cdist(x, y).square() / (2 * WFLOW.temps[0] * x.shape[-1])
    f, g = torch.zeros_like(logits[..., :1]), torch.zeros_like(logits[..., :1, :])
    for _ in range(WFLOW.sinkhorn_iters):
        f = -math.log(x.shape[-2]) - (logits + g).logsumexp(dim=-1, keepdim=True)
        g = -math.log(y.shape[-2]) - (logits + f).logsumexp(dim=-2, keepdim=True)
    plan = (logits + f + g).exp()
    return (plan @ y) / plan.sum(dim=-1, keepdim=True)


def ours(x: Tensor, pos: Tensor, uncond: Tensor, omega: Tensor, _: Tensor) -> Tensor:
    return drifting_loss(x, pos, uncond, omega, FieldSettings(), attraction=False)[0]


def wflow(x: Tensor, pos: Tensor, uncond: Tensor, omega: Tensor, negatives: Tensor) -> Tensor:
    return drifting_loss(x, pos, uncond, omega, WFLOW, negatives=negatives, attraction=False)[0]


PLAIN: dict[str, str] = {"ours": "vectorised", "wflow": "wflow_vectorised"}
LOSSES: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (ours, vectorised, wflow, wflow_vectorised)
}


def draw(classes: int, locations: int, channels: int, device: str) -> tuple[Tensor, ...]:
    """x, pos, uncond, omega, negatives; they overlap, as with a generator that has begun to learn."""
    generator = torch.Generator(device).manual_seed(0)
    x, pos, uncond, negatives = (
        torch.randn(classes, count, locations, channels, generator=generator, device=device)
        for count in (N, P, U, N)
    )
    omega = torch.linspace(1, 3, classes, device=device)
    return (0.9 * x + 0.1).requires_grad_(), pos, uncond, omega, 0.9 * negatives + 0.1


def value_and_gradient(name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    value = LOSSES[name](*inputs)
    (gradient,) = torch.autograd.grad(value, inputs[:1])
    return value.detach(), gradient


def extra_bytes(name: str, classes: int, locations: int, channels: int, device: str) -> int:
    """Peak memory of one value and gradient beyond the inputs."""
    where = torch.device(device)
    value_and_gradient(name, draw(1, 1, 8, device))  # libraries loaded, threads started
    inputs = draw(classes, locations, channels, device)
    restart_peak(where)
    before = peak_memory(where)
    value_and_gradient(name, inputs)
    return peak_memory(where) - before


def measure(locations: int, channels: int, classes: int, repeats: int, device: str) -> dict:
    """One row of the table."""
    inputs = draw(classes, locations, channels, device)
    results = {name: value_and_gradient(name, inputs) for name in LOSSES}  # and warm up
    for name, plain in PLAIN.items():
        for mine, theirs in zip(results[name], results[plain], strict=True):
            error = float((mine - theirs).norm() / theirs.norm())
            assert error < 1e-3, f"{name} at {locations} x {channels} differs by {error:.1e}"
    del results
    times = {name: [] for name in LOSSES}
    for _ in range(repeats):  # in turn, so that a slow moment hits them all
        for name in LOSSES:
            times[name] += seconds_of(partial(value_and_gradient, name, inputs), torch.device(device))
    del inputs
    extra = {}
    for name in LOSSES:  # on a CPU each in a process of its own
        with multiprocessing.get_context("spawn").Pool(1) if device == "cpu" else nullcontext() as pool:
            call = pool.apply if pool else lambda function, arguments: function(*arguments)
            extra[name] = call(extra_bytes, (name, classes, locations, channels, device))
    return {
        "locations": locations,
        "channels": channels,
        "classes": classes,
        "seconds": {name: median(spent) for name, spent in times.items()},
        "extra_bytes": extra,
    }


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--device", default=GPU_OR_CPU)
    options.add_argument(
        "--classes", type=int, help="classes per row; on a CPU as many as keep it to seconds"
    )
    options.add_argument("--repeats", type=int, default=7)
    args = options.parse_args(argv)
    facts = machine(torch.device(args.device))
    print(f"N {N}, P {P}, U {U}")
    print(f"{'locations':>9} {'channels':>8} {'classes':>7}"
          + "".join(f"{f'{name}: time, extra':>24}{plain:>18}" for name, plain in PLAIN.items()))  # fmt: skip
    rows = []
    for locations, channels in SHAPES:
        room = 2**24 // (N * locations * channels) if args.device == "cpu" else CLASSES
        classes = args.classes or max(1, min(CLASSES, room))
        row = measure(locations, channels, classes, args.repeats, args.device)
        rows.append(row)
        time, extra = row["seconds"], {name: max(1, size) for name, size in row["extra_bytes"].items()}
        line = f"{locations:9} {channels:8} {classes:7}"
        for name, plain in PLAIN.items():
            line += f"{1e3 * time[name]:9.1f} ms {extra[name] >> 20:7} MiB"
            line += f"{time[plain] / time[name]:9.2f}x {extra[plain] / extra[name]:6.2f}x"
        print(line, flush=True)
    means = {
        plain: geometric_mean(row["seconds"][plain] / row["seconds"][name] for row in rows)
        for name, plain in PLAIN.items()
    }
    print("times of ours, geometric mean: " + ", ".join(f"{name} {mean:.2f}" for name, mean in means.items()))
    write(args.json, {**facts, "n_p_u": [N, P, U], "temps": TEMPS, "rows": rows, "times_of_ours": means})


if __name__ == "__main__":
    main()
