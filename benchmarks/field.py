"""Speed and memory of the drifting loss against a plain one, at the shapes of a real step.

    python -m benchmarks.field [--json benchmarks/field.json] [--classes 64] [--device cuda] [--impl triton]

`literal` is Algorithm 2 of the paper for each class and location in turn, `vectorised` the same code for all
locations of a class at once, both with the release's conventions; "time" is that of the value and the
gradient, "extra" the peak of the memory beyond the inputs. With `--impl triton`, `ours` is the Triton kernel,
and `reference`, the same loss in PyTorch, is one more to compare it with. All figures of a table come from
one run; read the ratios, not the seconds. On a CPU the number of classes is scaled down to keep a row to
seconds.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from drift.field import FieldSettings, drifting_loss

CLASSES, N, P, U = 64, 64, 64, 16
SHAPES = ((1024, 256), (256, 256), (64, 512), (16, 1024), (16, 2048), (1, 2048), (1, 4096))
"""(locations, channels) of the encoder's feature sets."""
TEMPS = FieldSettings().temps
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain_loss(x: Tensor, pos: Tensor, uncond: Tensor, omega: Tensor, *, literal: bool) -> Tensor:
    """The drifting loss as Algorithm 2 says it; arguments as those of `drifting_loss`."""
    _, n, _, channels = x.shape
    u, numel = uncond.shape[1], x.numel()
    # Each problem is [*, C], or without the loop over locations [L, *, C]
    x, pos, uncond = (_problems(t.transpose(1, 2), literal) for t in (x, pos, uncond))

    targets, distances, weights = {}, {}, {}
    numerator, denominator = 0.0, 0.0
    for i in x:
        targets[i] = torch.cat([x[i].detach(), uncond[i], pos[i]], dim=-2)
        distances[i] = torch.cdist(x[i].detach(), targets[i])
        weights[i] = torch.ones(targets[i].shape[-2], device=omega.device)
        weights[i][n : n + u] = (omega[i[0]] - 1) * (n - 1) / u
        numerator += (distances[i] * weights[i]).sum()
        denominator += weights[i].expand_as(distances[i]).sum()
    scale = numerator / denominator / math.sqrt(channels)

    drifts, mean_squares = {}, dict.fromkeys(TEMPS, 0.0)
    for i in x:
        y = targets[i] / scale
        mask = 100 * torch.eye(n, len(weights[i]), device=omega.device)
        for tau in TEMPS:
            logits = -(distances[i] / (scale * math.sqrt(channels)) + mask) / tau
            affinity = (logits.softmax(dim=-1) * logits.softmax(dim=-2)).clamp(min=1e-6).sqrt() * weights[i]
            a_neg, a_pos = affinity[..., : n + u], affinity[..., n + u :]
            w_pos = a_pos * a_neg.sum(dim=-1, keepdim=True)
            w_neg = a_neg * a_pos.sum(dim=-1, keepdim=True)
            drifts[i, tau] = w_pos @ y[..., n + u :, :] - w_neg @ y[..., : n + u, :]
            mean_squares[tau] += drifts[i, tau].square().sum() / numel

    losses = []
    for i in x:
        drift = sum(drifts[i, tau] / mean_squares[tau].clamp(min=1e-8).sqrt() for tau in TEMPS)
        goal = x[i].detach() / scale + drift
        losses.append((x[i] / scale - goal).square().mean())
    return torch.stack(losses).mean()


def _problems(vectors: Tensor, literal: bool) -> dict[tuple, Tensor]:
    """`[Nc, L, *, C]` -> problems by (class, location), or by (class,).

    By `unbind`, as the gradient of an index into `vectors` would be as large as they.
    """
    by_class = {(c,): part for c, part in enumerate(vectors.unbind())}
    return (
        {(*c, l): p for c, ps in by_class.items() for l, p in enumerate(ps.unbind())} if literal else by_class
    )


def literal(*inputs: Tensor) -> Tensor:
    return plain_loss(*inputs, literal=True)


def vectorised(*inputs: Tensor) -> Tensor:
    return plain_loss(*inputs, literal=False)


def reference(*inputs: Tensor) -> Tensor:
    return drifting_loss(*inputs, FieldSettings())[0]


def in_triton(*inputs: Tensor) -> Tensor:
    return drifting_loss(*inputs, FieldSettings(), impl="triton")[0]


IMPLEMENTATIONS: dict[str, dict[str, Loss]] = {
    "reference": {"ours": reference, "vectorised": vectorised, "literal": literal},
    "triton": {"ours": in_triton, "reference": reference, "vectorised": vectorised, "literal": literal},
}
"""By `--impl`."""


def draw(classes: int, locations: int, channels: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, pos, uncond and omega: sets that overlap, as those of a generator that has begun to learn."""
    generator = torch.Generator(device).manual_seed(0)
    x, pos, uncond = (
        torch.randn(classes, count, locations, channels, generator=generator, device=device)
        for count in (N, P, U)
    )
    omega = torch.linspace(1, 3, classes, device=device)
    return (0.9 * x + 0.1).requires_grad_(), pos, uncond, omega


def value_and_gradient(loss: Loss, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    inputs[0].grad = None
    value = loss(*inputs)
    value.backward()
    return value.detach(), inputs[0].grad


def seconds(loss: Loss, inputs: tuple[Tensor, ...]) -> float:
    """Of one value and gradient."""
    _synchronize(inputs[0].device)
    start = time.perf_counter()
    value_and_gradient(loss, inputs)
    _synchronize(inputs[0].device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_bytes(loss: Loss, classes: int, locations: int, channels: int, device: str) -> int:
    """Peak memory of one value and gradient beyond the inputs, in a process of its own on a CPU."""
    if device != "cpu":
        return _extra_bytes(loss, classes, locations, channels, device)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_extra_bytes, (loss, classes, locations, channels, device))


def _extra_bytes(loss: Loss, classes: int, locations: int, channels: int, device: str) -> int:
    value_and_gradient(loss, draw(1, 1, 8, device))  # libraries loaded, threads started
    inputs = draw(classes, locations, channels, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        value_and_gradient(loss, inputs)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again
    before = _status("VmRSS")
    value_and_gradient(loss, inputs)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(key + ":"))
    return int(value) * 1024


def measure(
    losses: dict[str, Loss], locations: int, channels: int, classes: int, repeats: int, device: str
) -> dict:
    """One row of the table."""
    row = {"locations": locations, "channels": channels, "classes": classes}
    inputs = draw(classes, locations, channels, device)
    results = {name: value_and_gradient(loss, inputs) for name, loss in losses.items()}  # and warm up
    for name in losses:
        for quantity, mine, theirs in zip(("value", "gradient"), results["ours"], results[name], strict=True):
            error = float((mine - theirs).norm() / theirs.norm())
            assert error < 1e-3, f"{name} at {row}: {quantity} differs by {error:.1e}"
    del results
    times = {name: [] for name in losses}
    for _ in range(repeats):  # in turn, so that a slow moment hits them all
        for name, loss in losses.items():
            times[name].append(seconds(loss, inputs))
    del inputs
    row["seconds"] = {name: statistics.median(t) for name, t in times.items()}
    row["extra_mib"] = {
        name: extra_bytes(loss, classes, locations, channels, device) / 2**20 for name, loss in losses.items()
    }
    row["speedup"] = {n: row["seconds"][n] / row["seconds"]["ours"] for n in losses if n != "ours"}
    row["memory"] = {n: row["extra_mib"]["ours"] / row["extra_mib"][n] for n in losses if n != "ours"}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--classes", type=int, help="classes per row; on a CPU as many as keep it to seconds")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--skip-literal", action="store_true", help="leave out the loop over locations")
    parser.add_argument("--impl", choices=IMPLEMENTATIONS, default="reference", help="what is ours")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args()

    cpu = args.device == "cpu"
    if args.impl == "triton" and cpu:
        parser.error("--impl triton: allowed with --device cuda; the speed of an interpreter means nothing")
    losses = {
        name: loss
        for name, loss in IMPLEMENTATIONS[args.impl].items()
        if name != "literal" or not args.skip_literal
    }
    machine = platform.processor() or platform.machine() if cpu else torch.cuda.get_device_name(args.device)
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}; N {N}, P {P}, U {U}")
    print(f"{'locations':>9} {'channels':>8} {'classes':>7} {'ours':>10} {'extra':>10}   "
          + "   ".join(f"{name}: time, memory" for name in losses if name != "ours"))  # fmt: skip
    rows = []
    for locations, channels in SHAPES:
        # On a CPU so many that x has 2^24 numbers
        classes = args.classes or (
            max(1, min(CLASSES, 2**24 // (N * locations * channels))) if cpu else CLASSES
        )
        row = measure(losses, locations, channels, classes, args.repeats, args.device)
        rows.append(row)
        ratios = "".join(f"      {row['speedup'][n]:9.2f}x {row['memory'][n]:9.2f}" for n in row["speedup"])
        print(f"{locations:9} {channels:8} {classes:7} {row['seconds']['ours'] * 1e3:7.1f} ms "
              f"{row['extra_mib']['ours']:6.0f} MiB{ratios}", flush=True)  # fmt: skip
    means = {n: statistics.geometric_mean(r["speedup"][n] for r in rows) for n in rows[0]["speedup"]}
    print("geometric mean of the speed-up: " + ", ".join(f"{n} {m:.2f}x" for n, m in means.items()))
    if args.json:
        content = {
            "impl": args.impl,
            "device": machine,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "n_p_u": [N, P, U],
            "temps": TEMPS,
            "rows": rows,
            "geometric_mean_speedup": means,
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
