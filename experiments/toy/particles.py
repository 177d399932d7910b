"""particles: points that follow the field, without a network; couplings x temperatures as an animation.

    python -m experiments.toy.particles --out experiments/toy/results

    x <- x + step_size V(x)

Writes OUT/particles.gif, OUT/particles.png (its last frame) and OUT/particles.csv.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from drift.runtime.files import check_output
from drift.runtime.processes import run_stage
from experiments.common import load_section, save_figure, script_parser, w2_squared, write_csv
from experiments.toy.field import field_settings, velocity
from experiments.toy.figures import COLOURS, NAMES
from experiments.toy.settings import Particles, Toy

CENTRES = np.array([(-3.0, -3.0), (-3.0, 3.0), (3.0, -3.0), (3.0, 3.0)])
STD, START_VARIANCE = 0.5, 1.5
FRAMES_PER_SECOND, LAST_FRAME_SHOWN = 12, 18


def main(argv: Sequence[str] | None = None) -> int:
    args = script_parser(__doc__, "toy").parse_args(argv)
    settings = load_section(args.params, Toy)
    files = [args.out / f"particles.{kind}" for kind in ("gif", "png", "csv")]
    for file in files:
        check_output(file)
    p = settings.particles
    start, targets = draw(p.count, settings.seed)
    frames = frame_steps(p)
    panels = [(coupling, eps) for coupling in settings.couplings for eps in p.temps]
    paths = {
        panel: follow(start, targets, p, *panel, frames)
        for panel in tqdm(panels, desc="particles", ncols=100)
    }
    write_csv(files[2], [measured(path[-1], targets, *panel) for panel, path in paths.items()])
    animate(paths, targets, frames, files[0], files[1])
    return 0


def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Where particles start, from N(0, 1.5 I), and points of four Gaussians; `[count, 2]` each, float32."""
    rng = np.random.default_rng(seed)
    start = rng.normal(0.0, START_VARIANCE**0.5, (count, 2))
    targets = CENTRES[rng.integers(0, len(CENTRES), count)] + rng.normal(0.0, STD, (count, 2))
    return start.astype(np.float32), targets.astype(np.float32)


def frame_steps(p: Particles) -> list[int]:
    """The steps that the animation shows, from 0 to the last, ever further apart."""
    return sorted({round(p.steps * (k / (p.frames - 1)) ** 3) for k in range(p.frames)})


def follow(
    start: np.ndarray, targets: np.ndarray, p: Particles, coupling: str, eps: float, frames: Sequence[int]
) -> np.ndarray:
    """The particles at the steps of the frames, `[F, N, 2]`."""
    mask = {} if p.mask_self_neg else {"mask_self_neg": False}
    field = field_settings(coupling, p.dist_metric, eps, sinkhorn_iters=p.sinkhorn_iters, **mask)
    x, y, kept = torch.from_numpy(start), torch.from_numpy(targets), []
    for step in range(p.steps + 1):
        if step in frames:
            kept.append(x.numpy().copy())
        x = x + p.step_size * velocity(x, y, field)
    return np.stack(kept)


def measured(points: np.ndarray, targets: np.ndarray, coupling: str, eps: float) -> dict[str, Any]:
    """W2^2 to the targets, and how many of the four Gaussians hold at least half of their share."""
    near = np.linalg.norm(points[:, None] - CENTRES, axis=2) <= 3 * STD
    modes = int((near.sum(axis=0) >= len(points) / (2 * len(CENTRES))).sum())
    return {"coupling": coupling, "eps": eps, "w2": w2_squared(points, targets), "modes": modes}


def animate(
    paths: dict[tuple[str, float], np.ndarray],
    targets: np.ndarray,
    frames: Sequence[int],
    gif: Path,
    png: Path,
) -> None:
    """Panels of all couplings (rows) and temperatures (columns), through all frames; and the last as PNG."""
    couplings, temps = (list(dict.fromkeys(panel[i] for panel in paths)) for i in (0, 1))
    figure = Figure(figsize=(2 * len(temps) + 0.4, 2 * len(couplings) + 0.6), layout="constrained", dpi=80)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(couplings), len(temps), squeeze=False)
    dots = {}
    for (coupling, eps), path in paths.items():
        ax = axes[couplings.index(coupling), temps.index(eps)]
        ax.scatter(*targets.T, s=5, color="0.75", linewidths=0)
        dots[coupling, eps] = ax.scatter(*path[0].T, s=7, color=COLOURS[coupling], linewidths=0)
        ax.set(xlim=(-5, 5), ylim=(-5, 5), xticks=[], yticks=[], aspect="equal")
        if coupling == couplings[0]:
            ax.set_title(f"$\\varepsilon$ = {eps:g}", fontsize=10)
        if eps == temps[0]:
            ax.set_ylabel(NAMES[coupling], fontsize=10)
    title = figure.suptitle("", fontsize=11)

    def show(frame: int) -> None:
        title.set_text(f"step {frames[frame]}")
        for panel, dot in dots.items():
            dot.set_offsets(paths[panel][frame])

    order = [*range(len(frames)), *[len(frames) - 1] * LAST_FRAME_SHOWN]
    animation = FuncAnimation(figure, show, frames=order, init_func=lambda: None)
    draft = gif.with_name(f".{gif.name}.tmp.gif")
    animation.save(draft, writer=PillowWriter(fps=FRAMES_PER_SECOND))
    draft.replace(gif)
    save_figure(png, figure)


if __name__ == "__main__":
    run_stage(main, memory="particles.count")
