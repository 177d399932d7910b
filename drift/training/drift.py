"""Training of the generator: each step draws classes, moves their samples along the drift field, follows.

One step (paper Alg. 1): for every class slot draw omega, N noises, P real samples of the class and U real
samples of any class; generate; the drifting loss in the encoder's features gives the gradient. With
`negatives: second_batch` another N samples are generated to repel the first.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from drift.data.latents import LatentStore
from drift.data.queue import SampleQueue, choose_classes
from drift.field.settings import FieldSettings
from drift.launch import Ranks
from drift.models.ema import EMA
from drift.models.generator import Generator, GeneratorConfig
from drift.models.mae import LatentMAE
from drift.params import Drift, Hardware
from drift.seeds import derive_seed, torch_generator
from drift.training.loop import autocast, train
from drift.training.objective import drift_objective
from drift.training.schedule import draw_omega


def plot_columns(field: FieldSettings) -> list[str]:
    """What of each line of `logs.jsonl` goes into DVC's plots."""
    per_temperature = [f"{name}_{tau:g}" for name in _by_temperature(field) for tau in field.temps]
    return ["loss", *_by_temperature(field), *per_temperature, "scale", "grad_norm", "lr"]


def _by_temperature(field: FieldSettings) -> list[str]:
    """Statistics of `drifting_loss` that have one value per temperature."""
    return ["drift_rms", "neighbours", *(["marginal_error"] if field.coupling == "sinkhorn" else [])]


def generator_config(options: Drift, store: LatentStore) -> GeneratorConfig:
    """Sizes of the generator of `options` for the latents of `store`."""
    _, channels, height, _ = store.shape
    return GeneratorConfig(
        in_channels=channels,
        input_size=height,
        num_classes=store.num_classes,
        hidden_size=options.hidden,
        depth=options.depth,
        num_heads=options.heads,
        patch_size=options.patch,
        mlp_ratio=options.mlp_ratio,
        context_tokens=options.context_tokens,
        style_codebooks=options.style_codebooks,
        style_entries=options.style_entries,
    )


def summarise(statistics: Mapping[str, Mapping[str, Tensor]], field: FieldSettings) -> dict[str, Tensor]:
    """Statistics per feature set -> `[T]` per temperature and scalars, means over the feature sets.

    `drift_rms_<tau>` is the RMS of the raw drift before each temperature's normalisation, in units of the
    feature scale S, and `drift_rms` its mean over temperatures: the number that falls while the generator
    learns. The normalised loss stays about one per temperature and feature set by construction.
    """
    summary = {}
    for name in _by_temperature(field):
        means = torch.stack([s[name] for s in statistics.values()]).mean(dim=0)  # [T]
        summary[name] = means.mean()
        summary |= {f"{name}_{tau:g}": mean for tau, mean in zip(field.temps, means, strict=True)}
    return {**summary, "scale": torch.stack([s["scale"] for s in statistics.values()]).mean()}


def train_generator(
    store: LatentStore,
    encoder: LatentMAE,
    options: Drift,
    field: FieldSettings,
    *,
    seed: int,
    hardware: Hardware,
    ranks: Ranks,
    folder: Path,
) -> tuple[Generator, list[EMA]]:
    """Train a Generator on `store` in the features of `encoder`, going on from `folder` if it can.

    Returns the generator and one EMA per decay of `options.ema_decays`. Raises `UserError` if the classes of
    a step do not split over the processes, or a class has too few samples.
    """
    mine = ranks.share(options.classes_per_step, "drift.classes_per_step")  # of the Nc class slots
    torch.manual_seed(derive_seed(seed, "drift/init"))
    config = generator_config(options, store)
    model = Generator(config).to(ranks.device)
    network = torch.compile(model) if hardware.compile else model
    encoder = encoder.to(ranks.device).eval().requires_grad_(False)
    queue = SampleQueue(
        store.labels,
        store.num_classes,
        per_class=options.queue_per_class,
        global_size=options.queue_global,
        seed=seed,
        class_names=store.class_names,
    )
    queue.require(options.positives, options.unconditional)
    n = options.generated
    slots = range(mine.start, mine.stop)
    sample_shape = (config.in_channels, config.input_size, config.input_size)

    def draw(what: str, step: int) -> tuple[Tensor, Tensor]:
        """Noise `[Nc, N, C, H, W]` and style indices `[Nc, N, S]`, each slot from its own generator."""
        noise, style = [], []
        for slot in slots:
            generator = torch_generator(seed, what, step, slot)
            noise.append(torch.randn(n, *sample_shape, generator=generator))
            style.append(
                torch.randint(config.style_entries, (n, config.style_codebooks), generator=generator)
            )
        return torch.stack(noise).to(ranks.device), torch.stack(style).to(ranks.device)

    def compute(step: int):
        queue.push(step, options.queue_push)
        classes = choose_classes(seed, step, options.classes_per_step, store.num_classes)
        of_class, of_any = queue.draw(step, classes, options.positives, options.unconditional, slots)
        positives = store.rows(of_class).to(ranks.device)  # [Nc, P, C, H, W]
        unconditional = store.rows(of_any).to(ranks.device)  # [Nc, U, C, H, W]
        omega = draw_omega(
            options.classes_per_step,
            low=options.omega_min,
            high=options.omega_max,
            exponent=options.omega_exponent,
            no_guidance_fraction=options.no_guidance_fraction,
            generator=torch_generator(seed, "drift/omega", step),
        )[mine].to(ranks.device)  # [Nc]
        labels = torch.as_tensor(classes[mine], device=ranks.device)

        def generate(what: str) -> Tensor:
            noise, style = draw(what, step)
            samples = network(
                noise.flatten(0, 1),
                labels.repeat_interleave(n),
                omega.repeat_interleave(n),
                style.flatten(0, 1),
            )
            return samples.unflatten(0, (len(slots), n))  # [Nc, N, C, H, W]

        with autocast(ranks, hardware.precision):
            negatives = None
            if field.negatives == "second_batch":
                with torch.no_grad():
                    negatives = generate("drift/negatives")
            generated = generate("drift/noise")
            loss, statistics = drift_objective(
                generated,
                positives,
                unconditional,
                omega,
                encoder,
                field,
                negatives=negatives,
                reduce=ranks.sum if ranks.world_size > 1 else None,
                drop_duplicates=options.duplicate_features == "drop",
            )
        total = torch.stack([s["loss"] for s in statistics.values()]).sum()
        return loss, {"loss": total, **summarise(statistics, field), "feature_sets": statistics}

    emas = train(
        model,
        compute,
        options=options,
        ema_decays=options.ema_decays,
        hardware=hardware,
        ranks=ranks,
        folder=folder,
        what="drift",
        extra=queue,
    )
    return model, emas
