"""What a preset downloads, needs and costs, as counted. It runs before anything is installed.

    python scripts/plan.py imagenet256_ablation --gpus 8 --tflops 400 --price 2.5
    python scripts/plan.py --table        # the table of docs/imagenet.md

Work is in EFLOP, 10^18 operations, a multiplication with its addition as two: torch.utils.flop_counter's
count of one sample's forward pass, times samples and steps. tests/test_scripts.py counts again.
"""

import argparse
import sys
from typing import NamedTuple

IMAGENET = 1_281_167
"""Images for training."""


class Plan(NamedTuple):
    encode: float
    mae: float
    drift: float
    """With nothing computed again; a backward pass as two forward passes, through the encoder as one."""
    drift_as_set: float
    """With what the preset's section `hardware` computes again to spare memory, on `gpus` GPUs."""
    fid: float
    """The sweep over omega."""
    latents: float
    """GB of all views."""
    mae_checkpoint: float
    """GB; two are kept."""
    generator_checkpoint: float
    gpus: int
    gpu_memory: int
    """GB of each."""
    memory: int
    """GB of the machine."""
    weights: float = 0.33
    """GB to download; the SD-VAE's. Of pixels, ConvNeXt-V2's."""
    images: int = IMAGENET


PLANS = {
    "imagenet256_ablation": Plan(2.1, 41.6, 32.9, 70, 0.23, 63, 6.9, 3.7, 1, 80, 32),
    "imagenet256_b2": Plan(2.1, 1730, 1570, 4010, 0.23, 63, 43, 3.7, 8, 80, 64),
    "imagenet256_l2": Plan(2.1, 1730, 2180, 5020, 0.28, 63, 43, 13, 8, 80, 64),
    "sinkhorn_baseline": Plan(1.75, 41.6, 32.9, 43.5, 0.23, 52.5, 6.9, 3.7, 1, 80, 32),
    "sinkhorn_paper": Plan(1.75, 41.6, 32.9, 43.5, 0.23, 52.5, 6.9, 3.7, 1, 80, 32),
    "wflow_ablation": Plan(2.1, 41.6, 43.5, 54, 0.23, 63, 6.9, 2.1, 1, 80, 32),
    "wflow_b2": Plan(2.1, 1730, 2030, 2490, 0.27, 63, 43, 2.1, 8, 80, 64),
    "wflow_l2": Plan(2.1, 1730, 2840, 3500, 0.28, 63, 43, 7.4, 8, 80, 64),
    "wflow_xl2": Plan(2.1, 1730, 3740, 4540, 0.31, 63, 43, 10.9, 64, 80, 64),
    "rae_latent": Plan(0.06, 0, 4.5, 4.5, 0.08, 504, 0, 3.8, 1, 80, 64, 2.0),
    "imagenet512_rae": Plan(0.28, 0, 15.8, 15.8, 0.37, 2015, 0, 3.8, 1, 80, 256, 2.0),
    "imagenet512_b2": Plan(8.6, 166, 139, 293, 0.96, 252, 6.9, 3.7, 8, 80, 64),
    "pixel_b16": Plan(0, 1740, 1100, 2910, 0.017, 1008, 43, 3.7, 8, 80, 64, 0.35),
    "pixel_l16": Plan(0, 1740, 1400, 3420, 0.061, 1008, 43, 13, 8, 80, 64, 0.35),
    "photos": Plan(0.049, 0.87, 0.88, 1.16, 0.032, 1.5, 1.7, 0.54, 1, 24, 16, images=30_000),
}
PACKAGES, INCEPTION = 6, 0.1
"""GB to download. Of the packages most is torch's CUDA build: a guess, as are the 2 GB of the RAEs."""
FEATURES = 8192 / 1e9
"""GB of Inception's features of one image of the reference."""


def table() -> str:
    """All presets of ImageNet, in Markdown."""
    rows = [["preset", "`encode`", "`mae`", "`drift`", "as set", "`fid`", "latents", "checkpoints", "GPUs"]]
    rows.append(["---"] * len(rows[0]))
    for name, plan in PLANS.items():
        if plan.images == IMAGENET:
            work = plan.encode, plan.mae, plan.drift, plan.drift_as_set, plan.fid
            checkpoints = [plan.mae_checkpoint, plan.generator_checkpoint][not plan.mae :]
            numbers = (f"{n:g}" for n in (*work, plan.latents))
            rows.append([f"`{name}`", *numbers, ", ".join(f"{n:g}" for n in checkpoints), f"{plan.gpus}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def disk(plan: Plan) -> dict[str, float]:
    """GB by what takes it, beside the images."""
    return {
        "latents": plan.latents,
        "checkpoints": 2 * (plan.mae_checkpoint + plan.generator_checkpoint),
        "features of the reference": plan.images * FEATURES,
        "packages and weights": 2 * PACKAGES + plan.weights + INCEPTION,
    }


def describe(name: str, gpus: int, tflops: float, price: float | None) -> str:
    plan = PLANS[name]
    parts = disk(plan)
    fixed = plan.encode + plan.mae + plan.fid
    hours = [(fixed + drift) * 1e18 / (tflops * 1e12) / 3600 for drift in (plan.drift, plan.drift_as_set)]
    lines = [
        f"{name}: planned for {plan.gpus} x {plan.gpu_memory} GB of GPU memory, {plan.memory} GB of memory",
        f"downloads  Python packages (about {PACKAGES} GB), "
        f"pretrained weights ({plan.weights:g} GB), Inception ({INCEPTION:g} GB)",
        f"disk       {sum(parts.values()):.0f} GB: "
        + ", ".join(f"{what} {short(gb)}" for what, gb in parts.items()),
        f"work       encode {plan.encode:g} EFLOP, mae {plan.mae:g}, "
        f"drift {span([plan.drift, plan.drift_as_set])}, fid {plan.fid:g}",
        f"time       {span(hours)} GPU hours at {tflops:g} TFLOP/s, which is assumed; "
        f"{span([h / gpus for h in hours])} hours on {gpus} GPU{'s' * (gpus > 1)}",
    ]
    if price is not None:
        lines.append(f"cost       {span([h * price for h in hours])} at {price:g} per GPU hour")
    return "\n".join([*lines, "Counted, not measured."])


def span(numbers: list[float]) -> str:
    """From one to the other, or the one where they are equal."""
    return " to ".join(dict.fromkeys(map(short, numbers)))


def short(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def positive(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise ValueError
    return number


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="scripts/plan.py"
    )
    parser.add_argument("preset", nargs="?", metavar="PRESET", help=", ".join(PLANS))
    parser.add_argument("--gpus", type=int, help="GPUs that are there (those of the plan)")
    parser.add_argument("--tflops", type=positive, default=400, help="of each, as assumed (%(default)s)")
    parser.add_argument("--price", type=positive, help="of a GPU hour")
    parser.add_argument("--table", action="store_true", help="all of ImageNet's, in Markdown")
    parser.add_argument("--needs", action="store_true", help="GB of disk, GB of GPU, GB of memory, GPUs")
    args = parser.parse_args()
    if args.table:
        print(table())
        return 0
    if args.preset not in PLANS:
        known = ", ".join(PLANS)
        print(f"error: preset {args.preset}: there is no plan for it; one of {known}", file=sys.stderr)
        return 2
    plan = PLANS[args.preset]
    if args.needs:
        print(f"{sum(disk(plan).values()):.0f} {plan.gpu_memory} {plan.memory} {plan.gpus}")
    else:
        print(describe(args.preset, max(1, args.gpus or plan.gpus), args.tflops, args.price))
    return 0


if __name__ == "__main__":
    sys.exit(main())
