"""`params.yaml` -> typed, frozen settings. Every complaint about a setting is made here, before any work.

A file must hold every key and no other; a value of another type or out of range is refused with one
line that names the key, the value and what is allowed. Where a published value exists, the presets
hold it; sources are in the presets' headers.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from drift.field.settings import (
    FieldSettings,
    contradictions,
    unused,
    without_effect,
)
from drift.runtime.errors import UserError

Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Decay = Annotated[Number, Field(ge=0, lt=1)]
Omega = Annotated[Number, Field(ge=1)]
Switch = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1)]


OUTPUTS = ("artifacts/latents", "artifacts/mae", "artifacts/generator", "reports")
"""Folders that the stages write."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def without_effect(self) -> dict[str, str]:
        """The keys that change nothing beside the others, and why."""
        return {}


class Data(Section):
    dataset: Literal["digits", "folder"]
    """`digits`: scikit-learn's handwritten digits. `folder`: images as ROOT/<split>/<class>/*."""
    root: Text | None
    """Folder of the images for `dataset: folder`; null otherwise."""
    image_size: Count
    """Side in pixels of the square images that the VAE sees."""
    classes: Count
    """Number of classes; checked against the data."""

    def without_effect(self) -> dict[str, str]:
        return unused((self.dataset != "folder", f"dataset is {self.dataset}", "root"))


class Encode(Section):
    vae: Text
    """AutoencoderKL of diffusers: a local folder or a hub id."""
    vae_revision: Text | None
    """Revision on the hub; null is its default branch."""
    posterior: Literal["mean", "sample"]
    """The posterior's mean (prior) or one draw from it (release)."""
    mirror: Switch
    """Store every image's mirror beside it, in the centre view (release)."""
    crops: Count
    """Random crops per image in the augmented view."""
    crop_scale: tuple[Positive, Positive]
    """Smallest and largest share of the image's area in a random crop."""
    crop_ratio: tuple[Positive, Positive]
    """Smallest and largest aspect ratio of a random crop."""
    flip: Switch
    """Mirror a random crop with probability one half."""
    on_bad_image: Literal["error", "skip"]
    """Of images that do not decode, told together at the end: refuse to go on, or leave them out; of those
    that fid compares with as well."""
    precision: Literal["float32", "bfloat16"]
    """Of the VAE, by autocast. In bfloat16 it is faster and writes other latents; what is not finite in it is
    computed again in float32. On a GPU PyTorch's convolutions in float32 round their inputs to TF32."""


class Optimizer(Section):
    """AdamW with a linear warm-up, as both trainers use it (paper A.3, Table 8)."""

    steps: Count
    lr: Positive
    """Peak learning rate."""
    lr_schedule: Literal["constant", "cosine"]
    """What follows the warm-up."""
    lr_final: Share
    """Cosine: the last learning rate as a share of the peak."""
    warmup_steps: CountOrZero
    warmup_start_lr: NotNegative
    """Learning rate of the first step of the warm-up."""
    betas: tuple[Decay, Decay]
    weight_decay: NotNegative
    grad_clip: Positive
    """Largest norm of the whole gradient."""
    precision: Literal["float32", "bfloat16", "float16"]
    """Of the networks, by autocast, also where the MAE's held-out error is measured; weights, their moments
    and the field stay float32. With bfloat16, features of locations and patches are held in it too; with
    float16, the loss is scaled."""

    @model_validator(mode="after")
    def _warm_up_fits(self):
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps}: allowed: at most steps ({self.steps})")
        return self

    def without_effect(self) -> dict[str, str]:
        return unused(
            (self.lr_schedule == "constant", "lr_schedule is constant", "lr_final"),
            (self.warmup_steps == 0, "warmup_steps is 0", "warmup_start_lr"),
        )


class Mae(Optimizer):
    source: Text | None
    """Folder of an encoder to take as it is, from here or imported, instead of training one; null trains."""
    view: Literal["center", "augmented"]
    """The view that the MAE trains on: `augmented` (paper). With a `source`, `center` will do."""
    width: Count
    """Channels of the stem and the first stage; later stages have 2, 4 and 8 times as many."""
    layers: tuple[Count, Count, Count, Count]
    """Residual blocks of the four stages."""
    norm_groups: Count
    """Groups of every GroupNorm; the release has 32."""
    mask_patch: Count
    """Side of the square patches that are masked together."""
    mask_ratio: Annotated[Number, Field(gt=0, lt=1)]
    """Probability that a patch is masked."""
    batch_size: Count
    """Latents per step, over all processes."""
    ema_decay: Decay
    finetune_steps: CountOrZero
    """The last steps, in which a class loss is mixed in (paper A.3); 0 is none."""
    finetune_weight: Share
    """Share of the class loss at the end of its ramp; the rest is that of the masked error."""
    finetune_ramp_steps: CountOrZero
    """Steps over which that share rises from 0, its value at the first of them; 0 is no ramp."""
    held_out: CountOrZero
    """Images, all crops of each, that are kept out of training to measure reconstruction on; 0 is none."""
    evaluate_every: Count
    """Steps between two such measurements, which are taken with the EMA weights."""

    @model_validator(mode="after")
    def _consistent(self):
        if self.width % self.norm_groups:
            raise ValueError(f"norm_groups = {self.norm_groups}: allowed: a divisor of width ({self.width})")
        if self.finetune_steps > self.steps:
            raise ValueError(f"finetune_steps = {self.finetune_steps}: allowed: at most steps ({self.steps})")
        return self

    def without_effect(self) -> dict[str, str]:
        if self.source is not None:  # plainly trains nothing
            return {}
        return super().without_effect() | unused(
            (self.finetune_steps == 0, "finetune_steps is 0", "finetune_weight finetune_ramp_steps"),
            (self.held_out == 0, "held_out is 0", "evaluate_every"),
        )


class Drift(Optimizer):
    hidden: Count
    depth: Count
    heads: Count
    patch: Count
    """Side of the generator's patches, in latent pixels."""
    mlp_ratio: Positive
    context_tokens: CountOrZero
    """In-context conditioning tokens in front of the sequence."""
    style_codebooks: CountOrZero
    style_entries: Count
    """Entries of each style codebook."""
    classes_per_step: Count
    """Classes of one step, over all processes (Nc)."""
    generated: Annotated[int, Field(strict=True, ge=2)]
    """Generated samples per class and step (N)."""
    positives: Count
    """Real samples of the class per step (P)."""
    unconditional: CountOrZero
    """Real samples of any class per class and step (U)."""
    omega_min: Omega
    omega_max: Omega
    omega_exponent: Number
    """p(omega) is proportional to omega^-k on [omega_min, omega_max]; this is k."""
    no_guidance_fraction: Share
    """Probability that a class is trained at omega = 1 whatever that density says."""
    sampling: Literal["queue", "direct"]
    """Real samples of a step from the latest ones of a stream (paper A.8), or from all of the data."""
    queue_per_class: Count
    """The latest real samples of each class, from which positives are drawn."""
    queue_global: Count
    """The latest real samples of any class, from which unconditionals are drawn."""
    push_per_step: Count
    """Images that enter the queues at each step, of all processes together. The release counts per host."""
    class_sampling: Literal["pushed", "uniform"]
    """The classes of a step: labels of as many of the images just pushed, without replacement of images, so
    that a class may occur twice (release); or distinct ones, uniformly (prior)."""
    duplicate_features: Literal["keep", "drop"]
    """Feature sets that equal another by their shape (a 4x4 mean of a 4x4 map): keep (release) or drop."""
    ema_decays: Annotated[tuple[Decay, ...], Field(min_length=1)]
    """The first is the one that `Generator.from_pretrained` loads."""

    @model_validator(mode="after")
    def _consistent(self):
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"heads = {self.heads}: allowed: such that hidden ({self.hidden}) / heads is even"
            )
        if self.hidden % 4:
            raise ValueError(f"hidden = {self.hidden}: allowed: a multiple of 4 (2-D position embedding)")
        if self.omega_max < self.omega_min:
            raise ValueError(f"omega_max = {self.omega_max}: allowed: at least omega_min ({self.omega_min})")
        queue = self.sampling == "queue"
        if queue and self.positives > self.queue_per_class:
            raise ValueError(
                f"positives = {self.positives}: allowed: at most queue_per_class ({self.queue_per_class})"
            )
        if queue and self.unconditional > self.queue_global:
            raise ValueError(
                f"unconditional = {self.unconditional}: allowed: at most queue_global ({self.queue_global})"
            )
        if self.class_sampling == "pushed":
            if not queue:
                raise ValueError(
                    f"class_sampling = pushed: allowed: uniform, where sampling is {self.sampling}, which "
                    "pushes no images"
                )
            if self.push_per_step < self.classes_per_step:
                raise ValueError(
                    f"push_per_step = {self.push_per_step}: allowed: at least classes_per_step "
                    f"({self.classes_per_step}), where class_sampling is pushed"
                )
        if len(set(self.ema_decays)) < len(self.ema_decays):
            raise ValueError(f"ema_decays = {list(self.ema_decays)}: allowed: each decay once")
        return self

    def without_effect(self) -> dict[str, str]:
        unguided, one_omega = self.no_guidance_fraction == 1, self.omega_min == self.omega_max
        return super().without_effect() | unused(
            (self.style_codebooks == 0, "style_codebooks is 0", "style_entries"),
            (one_omega, "omega_min is omega_max", "omega_exponent"),
            (unguided, "no_guidance_fraction is 1", "omega_min omega_max omega_exponent"),
            (self.unconditional == 0, "unconditional is 0", "queue_global"),
            (self.sampling == "direct", "sampling is direct", "queue_per_class queue_global push_per_step"),
        )


class Fid(Section):
    features: Text
    """`inception` (clean-fid's), a TorchScript file, or the folder of an image classifier of this project."""
    inception: Text | None
    """A copy of Inception's weights for `mode`; null is PyTorch's cache, into which they are downloaded."""
    mode: Literal["clean", "legacy_tensorflow", "legacy_pytorch"]
    """How clean-fid resizes and which Inception it uses."""
    precision: Literal["float32", "bfloat16"]
    """Of the VAE that decodes, as in `encode`; generator and features are float32 always."""
    reference: Text
    """A split of the dataset (paper and release measure against `train`), a folder of images (a path with a
    slash), or an `.npz` of statistics (`mu` and `sigma`, or `ref_mu` and `ref_sigma`)."""
    labels: Text
    """`balanced`: sample i is of class i modulo `data.classes`; `random`: of any class (the Sinkhorn paper's
    code); or a split, for the labels of its images in a random order."""
    images: Count
    """Generated images per omega."""
    rounding: Literal["nearest", "down"]
    """Of generated pixels to 8 bits; the release and the Sinkhorn paper's code cut off (`down`), which makes
    images half a level darker."""
    floor_images: CountOrZero
    """Real training images that are measured like generated ones; 0 leaves them out."""
    omegas: Annotated[tuple[Omega, ...], Field(min_length=1)]
    ema_decays: Annotated[tuple[Decay, ...], Field(min_length=1)]
    """Which of the generator's EMA copies are measured; the first makes the pictures."""
    metrics: tuple[Literal["kid", "inception_score", "precision_recall"], ...]
    """Beside the Fréchet distance."""
    precision_recall_images: Count
    """Random images of each side for precision and recall; the time grows with the square."""
    picture_omega: Omega
    picture_classes: Count
    """Rows of `plots/samples.png` and `plots/omega.png`: so many classes, drawn at random."""
    picture_columns: Count

    @model_validator(mode="after")
    def _consistent(self):
        for key in ("omegas", "ema_decays", "metrics"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} = {list(values)}: allowed: each once")
        if self.inception is not None and self.features != "inception":
            raise ValueError(
                f"inception = {self.inception}: allowed: null, where features is not inception "
                f"({self.features})"
            )
        if self.reference.endswith(".npz"):
            for metric in ("kid", "precision_recall"):
                if metric in self.metrics:
                    raise ValueError(
                        f"metrics = {list(self.metrics)}: allowed: without {metric}, which compares single "
                        f"images, where reference is a file of statistics ({self.reference})"
                    )
        return self

    def without_effect(self) -> dict[str, str]:
        without = "precision_recall" not in self.metrics
        return unused(
            (without, "metrics is without precision_recall", "precision_recall_images"),
            (self.features != "inception", "features is not inception", "mode"),
        )


class Hardware(Section):
    """How, not what: tracked by no stage, so a change reruns nothing; it changes results by rounding."""

    deterministic: Switch
    """Only algorithms that give the same bits every time, which are slower: then a run on a GPU ends with the
    same bits whether it was cut or not. On a CPU it does so anyway."""
    compile: Switch
    """torch.compile for the networks; for the VAE on a CUDA device only."""
    mae_micro_batch: Count | None
    """Latents in one forward and backward pass of the MAE, per process; null is all of a step's."""
    classes_per_pass: Count | None
    """Classes in one forward and backward pass of the drift stage, per process; null is all of a step's.
    With fewer, features are computed up to three times: for S, for lambda and for the gradient."""
    feature_batch: Count | None
    """Samples whose activations the feature encoder keeps at once: others are computed again in the backward
    pass. null keeps all."""
    activation_checkpointing: Switch
    """Keep of the generator only what enters each block, and compute the rest again in the backward pass."""
    latents_on_device: Switch
    """Hold all latents in the device's memory instead of reading rows from the disk."""
    prefetch: CountOrZero
    """Steps whose latents are read ahead in the background; 0 reads them when they are needed."""
    time_limit: Positive
    """Minutes after which a process that waits in vain for the others gives up."""
    processes: Count | None
    """Processes per machine; null is one per CUDA device, or one on a CPU."""
    workers: CountOrZero
    """Helpers that decode images, per process: processes in encode, threads in fid; 0 decodes in place."""
    encode_batch: Count
    """Images that the VAE encodes at once, per process."""
    sample_batch: Count
    """Images that are generated and measured at once, per process: a multiple of 32 wastes nothing."""
    decode_batch: Count
    """Latents that the VAE decodes at once, per process; halved where the device runs out of memory."""
    png_folder: Text | None
    """Where fid keeps the samples as PNG files, in a folder per omega; null keeps none."""
    log_every: Count
    """Steps between two lines of `logs.jsonl`."""
    checkpoint_every: Count
    """Steps between two checkpoints, of which the newest two are kept."""
    checkpoint_keep_every: CountOrZero
    """Checkpoints of a multiple of so many steps are kept as well; 0 keeps none."""


ROUNDING_KEYS = (
    "deterministic",
    "compile",
    "mae_micro_batch",
    "classes_per_pass",
    "feature_batch",
)
"""Settings of `Hardware` that change results of training by rounding; the others change no bit of them."""


class Settings(Section):
    """All of `params.yaml`."""

    seed: CountOrZero
    coupling: Literal["row", "partial_two_sided", "sinkhorn"]
    """How logits become weights."""
    drift_form: Literal["alg2_joint", "split"]
    """How weights become a drift."""
    dist_metric: Literal["l2", "l2_sq"]
    temps: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Kernel temperatures tau."""
    mask_self_neg: Switch
    """Mask a generated sample out of its own negatives; `sinkhorn` never does (prior), and says so."""
    alg2_impl: Literal["logspace", "kernel"]
    """Softmaxes with each sum's own maximum, or exponentials first (prior), which may underflow."""
    sinkhorn_iters: Count
    sinkhorn_tolerance: NotNegative
    """A drift problem stops earlier, once the L1 error of its row marginal is at most this; 0 is never."""
    sinkhorn_marginal: Literal["none", "weighted_cols", "post_guidance"]
    """Where the weight of unconditional negatives enters: `none`, in the logits alone, which column scalings
    undo as they converge; `weighted_cols`, in the column marginal; `post_guidance`, after the iterations."""
    sinkhorn_agg_kernel: Switch
    """Average the Gibbs kernels over the temperatures and scale once."""
    drift_unit_vec: Switch
    """Weighted unit displacements instead of weighted targets."""
    drift_tau_scale: Switch
    """Multiply by the coefficient of the kernel's gradient."""
    normalize_drift_theta: Switch
    """Divide each temperature's drift by its RMS (lambda)."""
    normalization_scope: Literal["batch", "class"]
    """One S and one lambda for all classes of a step (release), or one per class (prior)."""
    uncond_weighting: Literal["affinity", "logit"]
    """An unconditional negative's weight multiplies A (release), or its log is added to the logit (prior)."""
    affinity_floor: NotNegative
    """Lower bound of A^2 (release: 1e-6; prior: 0); for `row` and `partial_two_sided`."""
    self_in_scale: Switch
    """Count pairs of a sample with itself in S (release), or leave them out where `mask_self_neg` (prior)."""
    unit_scale: Switch
    """S = 1."""
    negatives: Literal["self", "second_batch"]
    """What repels generated samples: they themselves, or a second batch of the same class (arXiv 2605.11755),
    which costs another forward pass of generator and encoder."""
    views: Annotated[tuple[Literal["center", "augmented"], ...], Field(min_length=1)]
    """The views that encode makes: `center` for the generator, `augmented` for the training of the MAE."""
    data: Data
    encode: Encode
    mae: Mae
    drift: Drift
    fid: Fid
    hardware: Hardware

    @model_validator(mode="after")
    def _consistent(self):
        if complaint := next(contradictions(self.field()), None):
            raise ValueError(complaint)
        self._require_inputs_of_its_own()
        self._require_a_difference()
        self._require_feasible_marginals()
        for needed, by in (("center", "the generator trains"), (self.mae.view, "mae.view")):
            if needed not in self.views:
                raise ValueError(f"views = {list(self.views)}: allowed: with {needed} ({by})")
        if self.data.dataset == "folder" and self.data.root is None:
            raise ValueError("data.root = null: allowed: a folder, where data.dataset is folder")
        for key in ("crop_scale", "crop_ratio"):
            low, high = getattr(self.encode, key)
            if low > high:
                raise ValueError(f"encode.{key} = {[low, high]}: allowed: the smaller number first")
        if self.encode.crop_scale[1] > 1:
            raise ValueError(f"encode.crop_scale = {list(self.encode.crop_scale)}: allowed: at most 1")
        if self.drift.classes_per_step > self.data.classes:
            raise ValueError(
                f"drift.classes_per_step = {self.drift.classes_per_step}: "
                f"allowed: at most data.classes ({self.data.classes})"
            )
        if missing := [decay for decay in self.fid.ema_decays if decay not in self.drift.ema_decays]:
            raise ValueError(
                f"fid.ema_decays = {list(self.fid.ema_decays)}: allowed: those of drift.ema_decays "
                f"({', '.join(map(str, self.drift.ema_decays))}), without {missing[0]}"
            )
        if self.fid.picture_classes > self.data.classes:
            raise ValueError(
                f"fid.picture_classes = {self.fid.picture_classes}: "
                f"allowed: at most data.classes ({self.data.classes})"
            )
        return self

    def _require_inputs_of_its_own(self) -> None:
        """Refuse inputs that DVC may remove before the stage that reads them has begun."""
        inputs = {
            "data.root": self.data.root,
            "encode.vae": self.encode.vae,
            "mae.source": self.mae.source,
            "fid.features": self.fid.features,
            "fid.inception": self.fid.inception,
            "fid.reference": self.fid.reference,
        }
        for key, value in inputs.items():
            if value is not None and (output := output_around(value)):
                raise ValueError(
                    f"{key} = {value!r}: allowed: outside of {output}, which DVC empties for the stage that "
                    f"writes it; copy it to a folder of its own (dvc checkout {output}, if it is empty now)"
                )

    def _require_a_difference(self) -> None:
        """Refuse what would train for days and end as another run does."""
        if self.drift_tau_scale and self.normalize_drift_theta:
            raise ValueError(
                "drift_tau_scale = true: cancels, as normalize_drift_theta divides every V_tau by its own "
                "RMS; set one of them to false"
            )
        if len(set(self.temps)) < len(self.temps):
            raise ValueError(f"temps = {list(self.temps)}: allowed: each temperature once")

    def _require_feasible_marginals(self) -> None:
        """Refuse uniform marginals of unconditional negatives that may have no weight at all."""
        drift = self.drift
        if self.coupling != "sinkhorn" or self.sinkhorn_marginal != "none" or not drift.unconditional:
            return
        if drift.omega_min <= 1 or drift.no_guidance_fraction > 0:
            raise ValueError(
                f"sinkhorn_marginal = 'none': at omega = 1 (drift.omega_min = {drift.omega_min:g}, "
                f"drift.no_guidance_fraction = {drift.no_guidance_fraction:g}) unconditional negatives weigh "
                "nothing and cannot have a uniform marginal; set sinkhorn_marginal to weighted_cols, or "
                "omega_min above 1 and no_guidance_fraction to 0"
            )

    def field(self) -> FieldSettings:
        """The knobs of the drifting field."""
        conventions = "sinkhorn" if self.normalization_scope == "class" else "release"
        return FieldSettings(conventions=conventions, **{key: getattr(self, key) for key in FIELD_KEYS})

    def without_effect(self) -> dict[str, str]:
        """The dotted keys of all sections."""
        found = without_effect(self.field(), self.drift.unconditional > 0)
        found |= unused(
            (
                "augmented" not in self.views,
                "views is without augmented",
                "encode.crops encode.crop_scale encode.crop_ratio encode.flip",
            )
        )
        for name in ("data", "encode", "mae", "drift", "fid"):
            found |= {f"{name}.{key}": why for key, why in getattr(self, name).without_effect().items()}
        return found

    def deciding(self, stage: str) -> dict[str, Any]:
        """What decides the result of a stage, as JSON holds it: of its section, and for `drift` of the field.

        Without what has no effect, so that a change of that is no other run.
        """
        content, idle = self.model_dump(mode="json"), self.without_effect()
        section = {key: value for key, value in content[stage].items() if f"{stage}.{key}" not in idle}
        field = FIELD_KEYS if stage == "drift" else ()
        return {**{key: content[key] for key in field if key not in idle}, stage: section}

    def remarks(self, stage: str) -> list[str]:
        """What is to be told of a stage's settings that do nothing, or not what their names say, in lines."""
        idle = self.without_effect()
        places = {"encode": ("data", "encode"), "drift": ("", "drift")}.get(stage, (stage,))
        by_reason: dict[str, list[str]] = {}
        for key, why in idle.items():
            section, _, name = key.rpartition(".")
            off = getattr(getattr(self, section) if section else self, name) in (None, False)
            if section in places and not off:
                by_reason.setdefault(why, []).append(key)
        told = "; ".join(f"{', '.join(keys)} ({why})" for why, keys in by_reason.items())
        lines = [f"without effect here: {told}"] if told else []
        if (
            stage == "drift"
            and self.coupling == "sinkhorn"
            and self.mask_self_neg
            and "mask_self_neg" not in idle
        ):
            lines.append(
                "mask_self_neg = true: coupling sinkhorn masks nothing (prior); only S leaves out pairs of a "
                "sample with itself"
            )
        return lines


RENAMED = {
    "drift.queue_push": "drift.push_per_step, which counts the images of all processes together",
    "hardware.precision": "mae.precision and drift.precision",
    "hardware.vae_precision": "encode.precision and fid.precision",
}
"""Keys of earlier files, and what has become of them."""


def output_around(path: str | Path) -> str | None:
    """The output of a stage that `path` is or lies in."""
    here = Path(path).resolve()
    return next((output for output in OUTPUTS if here.is_relative_to(Path(output).resolve())), None)


FIELD_KEYS: tuple[str, ...] = tuple(set(FieldSettings.__dataclass_fields__) & set(Settings.model_fields))


def load_settings(path: str | Path) -> Settings:
    """Read and check a `params.yaml`.

    Raises `UserError` with one line if the file is missing or not YAML, or a key or a value is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); presets/ holds complete files to copy"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}: line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8"
        ) from None
    # YAML 1.2, as DVC reads it: 1e-6 is a number
    try:
        content = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path}:{where} is not YAML: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds {type(content).__name__}, not settings; presets/ holds complete files"
        )
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_complaint(error)}") from None


def _complaint(error: ValidationError) -> str:
    """The first mistake as one line, and how many more there are."""
    problems = error.errors(include_url=False)
    # A misspelt key is reported twice, as unknown and as missing: the unknown one says more
    problems.sort(key=lambda p: {"extra_forbidden": 0, "missing": 2}.get(p["type"], 1))
    line = _one_complaint(problems[0])
    return f"{line} (and {len(problems) - 1} more)" if len(problems) > 1 else line


def _one_complaint(problem: dict[str, Any]) -> str:
    key = ".".join(map(str, problem["loc"]))
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        name = problem["loc"][-1]
        close = _places_of(name) or difflib.get_close_matches(name, _known_keys(problem["loc"][:-1]), n=1)
        hint = f"; did you mean {close[0]}?" if close else "; remove it"
        if key in RENAMED:
            hint = f"; it is now {RENAMED[key]}"
        return f"unknown key {key} (value {_show(value)}){hint}"
    if kind == "missing":
        return f"missing key {key}: presets/ holds complete files with a value for it"
    if kind == "value_error":
        own = str(context["error"])
        return f"{key}.{own}" if key else own
    if kind == "literal_error":
        return f"{key} = {_show(value)}: allowed: {context['expected'].replace(chr(39), '')}"
    allowed = {
        "greater_than": "above {gt:g}",
        "greater_than_equal": "{ge:g} or more",
        "less_than": "below {lt:g}",
        "less_than_equal": "at most {le:g}",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "a text",
        "string_too_short": "a text that is not empty",
        "tuple_type": "a list",
        "model_type": "a section with keys of its own",
        "too_short": "a list of at least {min_length}",
        "too_long": "a list of at most {max_length}",
    }.get(kind)
    return f"{key} = {_show(value)}: allowed: {allowed.format(**context) if allowed else problem['msg']}"


def _known_keys(location: tuple) -> list[str]:
    model: type[BaseModel] = Settings
    for part in location:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def _places_of(name: str) -> list[str]:
    """Keys of that very name, wherever they stand."""
    sections = {
        key: field.annotation
        for key, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    top = [name] if name in Settings.model_fields else []
    return top + [f"{key}.{name}" for key, section in sections.items() if name in section.model_fields]


def _show(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
