"""Settings: the presets are complete and right, and every mistake is one line that helps."""

import re
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from complaints import complaint

from drift.features import ENCODERS, LatentOptions, MAEOptions
from drift.field.settings import FieldSettings
from drift.runtime.errors import UserError
from drift.runtime.yaml_files import read_yaml
from drift.settings import FIELD_KEYS, Mae, Settings, load_settings
from drift.settings.sections import Data

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


def load_content(path: Path) -> dict:
    return read_yaml(path, "")


def changed(folder: Path, **changes) -> Path:
    """A copy of the digits preset with keys such as `drift__lr` set to a value, or removed by `...`."""
    content = load_content(ROOT / "presets" / "digits.yaml")
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = content
        for section in sections:
            place = place[section]
        if value is ...:
            del place[key]
        else:
            place[key] = value
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def refusal(folder: Path, **changes) -> str:
    """What `load_settings` says of the digits preset with `changes`."""
    return complaint(lambda: load_settings(changed(folder, **changes)))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_presets_are_valid_and_say_what_to_expect(preset):
    load_settings(preset)
    header = preset.read_text().split("seed:")[0]
    assert header.startswith("# ") and "To expect" in header and "Hardware" in header


def test_presets_quote_a_published_fid_only_beside_the_protocol_that_gives_it():
    quoting = {path for path in PRESETS if re.search(r"FID \d", path.read_text().split("seed:")[0])}
    assert {path.stem for path in quoting} == PUBLISHED.keys()
    for path in PRESETS:
        fid = load_settings(path).fid
        protocol = (fid.reference, fid.rounding, fid.labels, fid.images)
        if path in quoting:  # release and paper; as near as it is known to W-Flow
            assert protocol == ("train", "down", "balanced", 50_000)
        elif path.stem.startswith("sinkhorn"):  # the Sinkhorn paper's code
            assert protocol == ("val", "down", "random", 50_000)


def test_params_yaml_is_the_mnist_preset_as_shipped():
    if load_settings(ROOT / "params.yaml").data.dataset != "mnist5k":
        pytest.skip("params.yaml holds another experiment now")
    assert {p.stem for p in PRESETS} >= {
        "digits",
        "mnist",
        "imagenet256_ablation",
        "imagenet256_b2",
        "imagenet256_l2",
    }
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "presets" / "mnist.yaml").read_bytes()


@pytest.mark.parametrize(
    ("encoding", "told"),
    [("cp1252", "line 1 is not UTF-8 (byte 0xfc)"), ("utf-16", "line 1 is not UTF-8 (byte 0xff)")],
)
def test_a_file_in_another_encoding_is_one_line(tmp_path, encoding, told):
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    file = tmp_path / "params.yaml"
    file.write_text("# für digits\n" + text, encoding=encoding)
    assert complaint(lambda: load_settings(file)) == f"{file}: {told}; save it as UTF-8"
    file.write_text("# für digits\n" + text, encoding="utf-8")
    load_settings(file)
    file.write_text(text, encoding="utf-16-le")  # no mark at its beginning, and valid UTF-8
    complaint(lambda: load_settings(file))


@pytest.mark.parametrize(
    ("key", "value", "output"),
    [
        ("mae__source", "artifacts/mae", "artifacts/mae"),
        ("mae__source", "./artifacts/../artifacts/mae/", "artifacts/mae"),
        ("mae__source", "linked/encoder", "artifacts/mae"),
        ("encode__autoencoder", "artifacts/latents/center/vae", "artifacts/latents"),
        ("drift__init_from", "artifacts/generator", "artifacts/generator"),
        ("fid__reference", "reports/real", "reports"),
    ],
)
def test_what_dvc_empties_is_no_input(tmp_path, monkeypatch, key, value, output):
    (tmp_path / "artifacts/mae/encoder").mkdir(parents=True)
    (tmp_path / "linked").symlink_to(tmp_path / "artifacts/mae")
    monkeypatch.chdir(tmp_path)
    said = refusal(tmp_path, **{key: value})
    assert key.replace("__", ".") in said and repr(value) in said and f"outside of {output}," in said
    load_settings(changed(tmp_path, mae__source="artifacts/mae-of-another"))


PIXELS = {
    ("mae", "width"): 640, ("mae", "steps"): 200_000, ("mae", "finetune_steps"): 3_000,
    ("mae", "input_patch_size"): 8, ("mae", "view"): "augmented", ("drift", "view"): "augmented",
    ("drift", "patch"): 16, ("drift", "weight_decay"): 0.01, ("drift", "warmup_steps"): 10_000,
    ("drift", "steps"): 100_000, ("drift", "classes_per_step"): 128, ("drift", "positives"): 128,
    ("drift", "generated"): 64, ("drift", "unconditional"): 32, ("drift", "omega_exponent"): 5.0,
    ("drift", "no_guidance_fraction"): 0.0, ("drift", "push_per_step"): 4096,
}  # fmt: skip
# Paper Table 8 and A.8, and the release for pixels; a second writing-down of the presets, so that a slip in
# either shows
PUBLISHED = {
    "pixel_b16": PIXELS | {
        ("drift", "hidden"): 768, ("drift", "depth"): 12, ("drift", "heads"): 12, ("drift", "lr"): 2e-4,
    },
    "pixel_l16": PIXELS | {
        ("drift", "hidden"): 1024, ("drift", "depth"): 24, ("drift", "heads"): 16, ("drift", "lr"): 4e-4,
    },
    "imagenet256_ablation": {
        ("mae", "width"): 256, ("mae", "steps"): 30_000, ("mae", "finetune_steps"): 0,
        ("drift", "hidden"): 768, ("drift", "depth"): 12, ("drift", "heads"): 12,
        ("drift", "lr"): 2e-4, ("drift", "weight_decay"): 0.01, ("drift", "warmup_steps"): 5_000,
        ("drift", "steps"): 30_000, ("drift", "classes_per_step"): 64, ("drift", "positives"): 64,
        ("drift", "generated"): 64, ("drift", "unconditional"): 16, ("drift", "omega_exponent"): 3.0,
        ("drift", "no_guidance_fraction"): 0.0, ("drift", "push_per_step"): 1024,
    },
    "imagenet256_b2": {
        ("mae", "width"): 640, ("mae", "steps"): 200_000, ("mae", "finetune_steps"): 3_000,
        ("drift", "hidden"): 768, ("drift", "depth"): 12, ("drift", "heads"): 12,
        ("drift", "lr"): 4e-4, ("drift", "weight_decay"): 0.0, ("drift", "warmup_steps"): 10_000,
        ("drift", "steps"): 200_000, ("drift", "classes_per_step"): 128, ("drift", "positives"): 64,
        ("drift", "generated"): 64, ("drift", "unconditional"): 32, ("drift", "omega_exponent"): 5.0,
        ("drift", "no_guidance_fraction"): 0.0, ("drift", "push_per_step"): 4096,
    },
    "imagenet256_l2": {
        ("mae", "width"): 640, ("mae", "steps"): 200_000, ("mae", "finetune_steps"): 3_000,
        ("drift", "hidden"): 1024, ("drift", "depth"): 24, ("drift", "heads"): 16,
        ("drift", "lr"): 4e-4, ("drift", "weight_decay"): 0.01, ("drift", "warmup_steps"): 10_000,
        ("drift", "steps"): 200_000, ("drift", "classes_per_step"): 128, ("drift", "positives"): 64,
        ("drift", "generated"): 64, ("drift", "unconditional"): 32, ("drift", "omega_exponent"): 3.0,
        ("drift", "no_guidance_fraction"): 0.5, ("drift", "push_per_step"): 2048,
    },
    "wflow_ablation": {
        ("mae", "width"): 256, ("mae", "steps"): 30_000, ("mae", "finetune_steps"): 0,
        ("drift", "hidden"): 768, ("drift", "depth"): 12, ("drift", "heads"): 12,
        ("drift", "lr"): 2e-4, ("drift", "weight_decay"): 0.01, ("drift", "warmup_steps"): 5_000,
        ("drift", "steps"): 30_000, ("drift", "classes_per_step"): 64, ("drift", "positives"): 64,
        ("drift", "generated"): 64, ("drift", "unconditional"): 16, ("drift", "omega_exponent"): 3.0,
        ("drift", "no_guidance_fraction"): 0.0, ("drift", "push_per_step"): 8 * 64,
        ("drift", "ema_decays"): (0.999,),
    },
    "wflow_b2": {
        ("mae", "width"): 640, ("mae", "steps"): 200_000, ("mae", "finetune_steps"): 3_000,
        ("drift", "hidden"): 768, ("drift", "depth"): 12, ("drift", "heads"): 12,
        ("drift", "lr"): 4e-4, ("drift", "weight_decay"): 0.0, ("drift", "warmup_steps"): 10_000,
        ("drift", "steps"): 200_000, ("drift", "classes_per_step"): 128, ("drift", "positives"): 64,
        ("drift", "generated"): 64, ("drift", "unconditional"): 32, ("drift", "omega_exponent"): 5.0,
        ("drift", "no_guidance_fraction"): 0.0, ("drift", "push_per_step"): 8 * 128,
        ("drift", "ema_decays"): (0.999,),
    },
    "wflow_l2": {
        ("mae", "width"): 640, ("mae", "steps"): 200_000, ("mae", "finetune_steps"): 3_000,
        ("drift", "hidden"): 1024, ("drift", "depth"): 24, ("drift", "heads"): 16,
        ("drift", "lr"): 4e-4, ("drift", "weight_decay"): 0.01, ("drift", "warmup_steps"): 10_000,
        ("drift", "steps"): 200_000, ("drift", "classes_per_step"): 128, ("drift", "positives"): 64,
        ("drift", "generated"): 64, ("drift", "unconditional"): 32, ("drift", "omega_exponent"): 3.0,
        ("drift", "no_guidance_fraction"): 0.5, ("drift", "push_per_step"): 8 * 128,
        ("drift", "ema_decays"): (0.999,),
    },
    "wflow_xl2": {
        ("mae", "width"): 640, ("mae", "steps"): 200_000, ("mae", "finetune_steps"): 3_000,
        ("drift", "hidden"): 1152, ("drift", "depth"): 28, ("drift", "heads"): 16,
        ("drift", "lr"): 3e-4, ("drift", "weight_decay"): 0.01, ("drift", "warmup_steps"): 10_000,
        ("drift", "steps"): 200_000, ("drift", "classes_per_step"): 128, ("drift", "positives"): 128,
        ("drift", "generated"): 64, ("drift", "unconditional"): 32, ("drift", "omega_exponent"): 4.0,
        ("drift", "no_guidance_fraction"): 0.2, ("drift", "push_per_step"): 64 * 128,
        ("drift", "ema_decays"): (0.999,), ("hardware", "activation_checkpointing"): True,
    },
}  # fmt: skip
PUBLISHED_PLANS = {
    "wflow_ablation": (0.05, 10),
    "wflow_b2": (0.05, 10),
    "wflow_l2": (0.05, 1),
    "wflow_xl2": (0.01, 1),
}
"""Regularisation and iterations of W-Flow's."""
PUBLISHED_EVERYWHERE = {
    ("mae", "layers"): (3, 4, 6, 3), ("mae", "norm_groups"): 32, ("mae", "lr"): 4e-3,
    ("mae", "betas"): (0.9, 0.95), ("mae", "weight_decay"): 0.01, ("mae", "warmup_steps"): 4_000,
    ("mae", "warmup_start_lr"): 1e-6, ("mae", "batch_size"): 8_192, ("mae", "grad_clip"): 2.0,
    ("mae", "ema_decay"): 0.9995, ("mae", "mask_ratio"): 0.5, ("mae", "mask_patch"): 2,
    ("mae", "finetune_weight"): 0.1, ("drift", "patch"): 2, ("drift", "context_tokens"): 16,
    ("drift", "style_codebooks"): 32, ("drift", "style_entries"): 64, ("drift", "betas"): (0.9, 0.95),
    ("drift", "grad_clip"): 2.0, ("drift", "ema_decays"): (0.999, 0.9995, 0.9998, 0.9999),
    ("drift", "omega_min"): 1.0, ("drift", "omega_max"): 4.0, ("drift", "queue_per_class"): 128,
    ("drift", "queue_global"): 1_000, ("fid", "images"): 50_000, ("data", "image_size"): 256,
    ("drift", "class_sampling"): "pushed",
    ("data", "classes"): 1_000, ("encode", "crop_scale"): (0.2, 1.0), ("encode", "flip"): True,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_hold_the_published_settings(name):
    settings = load_settings(ROOT / "presets" / f"{name}.yaml")
    for (section, key), value in (PUBLISHED_EVERYWHERE | PUBLISHED[name]).items():
        assert getattr(getattr(settings, section), key) == value, f"{section}.{key}"
    field = FieldSettings()
    if name in PUBLISHED_PLANS:  # all else of the bundle is held by golden numbers
        tau, iterations = PUBLISHED_PLANS[name]
        field = FieldSettings.wflow(temps=(tau,), sinkhorn_iters=iterations, classes_per_part=2)
    assert settings.field_settings() == field


def test_every_setting_of_the_field_has_one_place():
    settings = load_settings(ROOT / "presets" / "digits.yaml")
    sections = {"views", "field", "features", "data", "encode", "mae", "drift", "fid", "hardware", "seed"}
    assert set(type(settings).model_fields) - sections == set(FIELD_KEYS)
    members = set(type(settings.field).model_fields)
    assert members | set(FIELD_KEYS) | {"options", "classes_per_part"} == set(get_type_hints(FieldSettings))
    assert not members & set(FIELD_KEYS)


def test_presets_say_only_what_they_change():
    for path in PRESETS:
        content, defaults = load_content(path), load_content(ROOT / "tests" / "defaults.yaml")
        for section, keys in defaults.items():
            same = [key for key, value in content[section].items() if value == keys.get(key, ...)]
            same = [key for key in same if key != "view"]  # which dvc.yaml reads
            assert not same, f"{path}: {section}: {same}"


def test_defaults_are_as_written_down():
    """Neither DVC nor a fingerprint notices that a default changes: CONTRIBUTING.md says what to do then."""
    written = load_content(ROOT / "tests" / "defaults.yaml")
    for name, kind in Settings.model_fields.items():
        if name in written:
            assert kind.annotation.model_construct().model_dump(mode="json") == written[name]


def test_a_key_that_is_left_out_has_its_default_and_is_no_other_run(tmp_path):
    short = load_settings(changed(tmp_path))
    written_out = load_settings(changed(tmp_path, drift__patch=2, drift__mlp_ratio=4.0, mae__mask_ratio=0.5))
    assert short.drift == written_out.drift
    assert [short.deciding(stage) for stage in ("mae", "drift")] == [
        written_out.deciding(stage) for stage in ("mae", "drift")
    ]


SINKHORN = {"coupling": "sinkhorn", "drift_form": "split"}
WFLOW = SINKHORN | {"conventions": "wflow", "negatives": "second_batch"}
GUIDED = {"drift__omega_min": 1.1, "drift__no_guidance_fraction": 0.0}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"drift__postives": 3}, ["drift.postives", "3", "did you mean drift.positives?"]),
        ({"colour": "red"}, ["unknown key colour", "'red'"]),
        ({"coupling": ...}, ["missing key coupling", "presets/"]),
        ({"data__dataset": ...}, ["missing key data.dataset"]),
        ({"mae": ...}, ["missing key mae"]),
        ({"coupling": "sinkhron"}, ["coupling", "'sinkhron'", "row", "partial_two_sided", "sinkhorn"]),
        ({"temps": [0.02, -0.05]}, ["temps.1", "-0.05", "greater than 0"]),
        ({"temps": []}, ["temps", "at least 1 item"]),
        ({"features": ["nope"]}, ["features.0 = 'nope': allowed: " + ", ".join(ENCODERS)]),
        ({"features": "mae"}, ["features = 'mae': allowed: a list"]),
        ({"views": ["augmented"]}, ["views = ['augmented']", "center"]),
        ({"views": ["center"]}, ["views = ['center']", "augmented (mae.view)"]),
        ({"views": ["center"], "drift__view": "augmented"}, ["views = ['center']", "augmented (drift.view)"]),
        ({"drift__view": "middle"}, ["drift.view = 'middle': allowed: center or augmented"]),
        ({"drift__classes_per_step": 11}, ["drift.classes_per_step = 11", "data.classes (10)"]),
        ({"drift__positives": 0}, ["drift.positives", "greater than or equal to 1"]),
        ({"drift__positives": 129}, ["drift.positives = 129", "queue_per_class (128)"]),
        ({"drift__steps": 10.5}, ["drift.steps", "10.5", "valid integer"]),
        ({"drift__steps": True}, ["drift.steps", "True", "valid integer"]),
        ({"drift__lr": float("nan")}, ["drift.lr", "nan"]),
        ({"drift__heads": 5}, ["drift.heads = 5", "96"]),
        ({"drift__warmup_steps": 2000}, ["drift.warmup_steps = 2000", "steps (1200)"]),
        ({"mae__norm_groups": 5}, ["mae.norm_groups = 5", "width (16)"]),
        ({"hardware__compile": 1}, ["hardware.compile", "valid boolean"]),
        ({"mask_self_neg": True}, ["unknown key mask_self_neg", "it is now field.mask_self_neg"]),
        ({"vanilla": True}, ["unknown key vanilla", "it is now field.unit_scale"]),
        ({"field__temps": [0.1]}, ["field.temps", "a key of its own at the top level"]),
        ({"field__rho": 2.0}, ["field.rho", "no option of coupling partial_two_sided"]),
        ({"coupling": "unbalanced", "field__rho": 0.0}, ["rho = 0.0", "above 0"]),
        (
            WFLOW | {"drift__classes_per_step": 5},
            ["drift.classes_per_step = 5", "drift.classes_per_part (2)"],
        ),
        (
            WFLOW | {"hardware__classes_per_pass": 3},
            ["hardware.classes_per_pass = 3", "classes_per_part (2)"],
        ),
        ({"field__classes_per_part": 2}, ["field.classes_per_part: is drift.classes_per_part"]),
        ({"conventions": "prior"}, ["conventions", "'prior'", "release", "sinkhorn or wflow"]),
        ({"data__dataset": "folder"}, ["data.root = null", "folder"]),
        ({"encode__crop_scale": [0.9, 0.2]}, ["encode.crop_scale", "smaller number first"]),
        ({"fid__ema_decays": [0.9]}, ["fid.ema_decays = [0.9]", "0.995"]),
        ({"fid__omegas": [1.0, 1]}, ["omegas = [1.0, 1.0]", "each once"]),
        ({"fid__inception": "x.pt"}, ["inception = 'x.pt'", "features is not inception"]),
        ({"fid__reference": "a/b.npz"}, ["metrics = ", "without kid", "a/b.npz"]),
        ({"fid__metrics": ["fid"]}, ["fid.metrics.0", "precision_recall"]),
        ({"seed": -1}, ["seed", "-1", "greater than or equal to 0"]),
        ({"drift": 3}, ["drift = 3", "dictionary"]),
        ({"drift__classes_per_pass": 8}, ["drift.classes_per_pass", "mean hardware.classes_per_pass?"]),
        ({"drift__coupling": "row"}, ["drift.coupling", "'row'", "did you mean coupling?"]),
        (
            {"drift__queue_push": 64},
            ["drift.queue_push (value 64)", "is now drift.push_per_step", "all processes"],
        ),
        (
            {"drift__class_sampling": "pushed", "drift__push_per_step": 9},
            ["drift.push_per_step = 9", "at least classes_per_step (10)"],
        ),
        (
            {"drift__class_sampling": "pushed", "drift__sampling": "direct"},
            ["drift.class_sampling = 'pushed'", "uniform, where sampling is direct"],
        ),
        ({"encode__precision": "float16"}, ["encode.precision", "float32 or bfloat16"]),
        (
            {"hardware__precision": "bfloat16"},
            ["unknown key hardware.precision (value 'bfloat16')", "now mae.precision and drift.precision"],
        ),
        (
            {"hardware__vae_precision": "float32"},
            [
                "unknown key hardware.vae_precision (value 'float32')",
                "now encode.precision and fid.precision",
            ],
        ),
        (SINKHORN | {"field__alg2_impl": "kernel"}, ["alg2_impl is kernel", "use alg2_impl logspace"]),
        (
            SINKHORN | {"field__sinkhorn_marginal": "none"},
            ["field.sinkhorn_marginal = 'none'", "omega_min = 1", "weigh nothing"],
        ),
        (
            SINKHORN | GUIDED | {"field__sinkhorn_marginal": "none", "drift__no_guidance_fraction": 0.5},
            ["sinkhorn_marginal = 'none'", "no_guidance_fraction = 0.5", "weighted_cols"],
        ),
        (
            SINKHORN | {"drift__generated": 2},
            ["mask_self_neg is true", "2 generated samples", "use 3 or more"],
        ),
        ({"coupling": "sinkhorn", "sinkhorn_iters": 0}, ["sinkhorn_iters is 0", "use drift_form split"]),
        ({"sinkhorn_iters": -1}, ["sinkhorn_iters", "-1", "greater than or equal to 0"]),
        ({"field__drift_tau_scale": True}, ["drift_tau_scale = true", "cancels", "set one of them to false"]),
        ({"temps": [0.02, 0.05, 0.02]}, ["temps = [0.02, 0.05, 0.02]", "each temperature once"]),
        ({"field__sinkhorn_tolerance": -1e-3}, ["sinkhorn_tolerance", "-0.001", "0 or more"]),
        ({"field__affinity_floor": "low"}, ["field.affinity_floor", "'low'", "number"]),
    ],
)
def test_mistakes_are_one_line_with_key_value_and_way_out(tmp_path, changes, wanted):
    message = refusal(tmp_path, **changes)
    for part in wanted:
        assert part in message


def test_the_sizes_of_the_queue_bound_nothing_where_there_is_none(tmp_path):
    settings = load_settings(
        changed(tmp_path, drift__sampling="direct", drift__positives=129, drift__unconditional=1001)
    )
    assert settings.drift.positives > settings.drift.queue_per_class


def test_features_are_encoders_by_name_or_with_options(tmp_path):
    made = load_settings(changed(tmp_path, features=["latent", {"encoder": "mae", "duplicates": "drop"}]))
    assert made.features == (LatentOptions(), MAEOptions(duplicates="drop")) and made.needs_mae
    assert not load_settings(changed(tmp_path, features=["latent"])).needs_mae
    of_images = load_settings(changed(tmp_path, features=["latent", "dinov2"]))
    assert of_images.needs_decoder and not (of_images.needs_mae or made.needs_decoder)
    assert "features" in load_settings(changed(tmp_path, features=["latent"])).deciding("drift")
    assert "features" not in load_settings(changed(tmp_path, features=["mae"])).deciding("drift")
    for features, wanted in (
        (["dino"], "'dino'"),
        ([], "at least 1 item"),
        ([{"encoder": "mae", "duplicate": "drop"}], "features.0.mae.duplicate"),
        (["mae", "latent", "mae"], "features = mae, latent, mae: allowed: each encoder once"),
        (["moco"], "features.0.moco.source"),
    ):
        assert wanted in refusal(tmp_path, features=features)
    assert "is now features" in refusal(tmp_path, drift__duplicate_features="drop")


def test_an_autoencoder_is_a_text_or_a_kind_with_its_source(tmp_path):
    for written, source, revision in (
        ("somebody/vae", "somebody/vae", None),
        ({"source": "somebody/vae", "revision": "main"}, "somebody/vae", "main"),
        ({"kind": "kl", "source": "folder"}, "folder", None),
        ({"source": "kl"}, "kl", None),
    ):
        made = load_settings(changed(tmp_path, encode__autoencoder=written)).encode.autoencoder
        assert (made.kind, made.source, made.revision) == ("kl", source, revision)
    pixels = load_settings(changed(tmp_path, encode__autoencoder="pixels")).encode.autoencoder
    assert (pixels.kind, pixels.source, pixels.id) == ("pixels", None, "pixels")
    for written, wanted in (
        ("kl", "encode.autoencoder.source = null: allowed: a folder or a hub id, where kind is kl"),
        ({"kind": "vq", "source": "x"}, "encode.autoencoder.kind = 'vq': allowed: kl, rae or pixels"),
        (
            {"kind": "pixels", "source": "x"},
            "encode.autoencoder.source = 'x': allowed: null, where kind is pixels",
        ),
        ({"kind": "pixels", "revision": "x"}, "encode.autoencoder.revision = 'x': allowed: null"),
        ({"source": "pixels"}, "encode.autoencoder.source = 'pixels': allowed: ./pixels, if it is a folder"),
        ({"source": "x", "commit": "y"}, "unknown key encode.autoencoder.commit"),
    ):
        assert wanted in refusal(tmp_path, encode__autoencoder=written)
    assert "it is now encode.autoencoder" in refusal(tmp_path, encode__vae="x")
    assert "revision: ...}" in refusal(tmp_path, encode__vae_revision="x")


def test_conventions_then_top_level_then_field(tmp_path):
    """Later ones win."""
    settings = load_settings(changed(tmp_path, conventions="wflow", field={"cost_factor": 1.0}))
    top = {key: getattr(settings, key) for key in FIELD_KEYS[1:]}
    assert settings.field_settings() == FieldSettings.wflow(**top, cost_factor=1.0, classes_per_part=2)
    assert top["coupling"] == "partial_two_sided"
    made = load_settings(changed(tmp_path, coupling="unbalanced", field={"rho": 3, "affinity_floor": 1e-4}))
    assert made.field_settings().options == {"rho": 3}
    assert made.field_settings().affinity_floor == 1e-4


def test_sinkhorn_presets_have_that_papers_field_in_the_ablation_setting():
    ablation, baseline, sinkhorn = (
        load_settings(ROOT / "presets" / f"{name}.yaml")
        for name in ("imagenet256_ablation", "sinkhorn_baseline", "sinkhorn_paper")
    )
    assert baseline.field_settings() == FieldSettings.sinkhorn()
    assert sinkhorn.field_settings() == FieldSettings.sinkhorn(coupling="sinkhorn", drift_form="split")
    for settings in (baseline, sinkhorn):
        assert settings.mae == ablation.mae
        assert settings.drift == ablation.drift.model_copy(update={"class_sampling": "uniform"})
        assert settings.encode.autoencoder.source == "stabilityai/sd-vae-ft-ema"
        assert settings.encode.posterior == "mean"
        assert settings.fid.reference == "val"


def test_presets_in_other_latents_change_nothing_else():
    published, ablation, *in_rae, b2 = (
        load_settings(ROOT / "presets" / f"{name}.yaml")
        for name in (
            "sinkhorn_paper",
            "imagenet256_ablation",
            "rae_latent",
            "imagenet512_rae",
            "imagenet512_b2",
        )
    )
    for settings, size in zip(in_rae, (256, 512), strict=True):
        assert not settings.needs_mae and settings.views == ("center",) and settings.data.image_size == size
        assert settings.field_settings() == published.field_settings()
        assert settings.drift == published.drift.model_copy(update={"steps": 25_022})
        assert settings.fid == published.fid
        assert settings.encode.autoencoder.kind == "rae" and settings.encode.posterior_used == "mean"
    assert b2.data == ablation.data.model_copy(update={"image_size": 512})
    assert (b2.encode, b2.mae, b2.drift, b2.fid) == (
        ablation.encode,
        ablation.mae,
        ablation.drift,
        ablation.fid,
    )


SINGLE_VIEW = {"views": ["center"], "mae__view": "center"}


@pytest.mark.parametrize(
    ("dataset", "ignored"), [("digits", ["root"]), ("mnist5k", ["root"]), ("mnist", []), ("folder", [])]
)
def test_the_root_of_a_data_set_that_lies_in_files_has_an_effect(dataset, ignored):
    assert list(Data(dataset=dataset, root="somewhere").without_effect()) == ignored


@pytest.mark.parametrize(
    ("stage", "changes", "remarks"),
    [
        ("drift", {}, "without effect here: sinkhorn_iters (coupling is partial_two_sided)"),
        ("drift", {"coupling": "sinkhorn"}, None),
        ("drift", WFLOW | {"drift__classes_per_part": 5}, None),
        (
            "drift",
            {"coupling": "sinkhorn", "drift__classes_per_part": 5},
            "without effect here: drift.classes_per_part (normalization_scope is batch)",
        ),
        (
            "drift",
            {"coupling": "sinkhorn", "field": {"affinity_floor": 1e-3}, "drift__sampling": "direct"},
            "without effect here: field.affinity_floor (coupling is sinkhorn); drift.push_per_step (sampling "
            "is direct)",
        ),
        ("mae", {}, None),
        (
            "mae",
            {"mae__finetune_steps": 0, "mae__held_out": 0},
            "without effect here: mae.finetune_weight, mae.finetune_ramp_steps (finetune_steps is 0); "
            "mae.evaluate_every (held_out is 0)",
        ),
        (
            "encode",
            {"encode__autoencoder": "pixels", "encode__precision": "bfloat16"},
            "without effect here: encode.posterior, encode.precision (autoencoder is pixels)",
        ),
        (
            "fid",
            {"encode__autoencoder": "pixels", "fid__precision": "float32"},
            "without effect here: fid.precision (encode.autoencoder is pixels)",
        ),
        (
            "encode",
            SINGLE_VIEW | {"encode__flip": True, "data__root": "elsewhere"},
            "without effect here: encode.crop_scale, encode.crop_ratio, encode.flip (views is without "
            "augmented); data.root (dataset is digits)",
        ),
    ],
)
def test_what_is_written_without_effect_is_said_once(tmp_path, stage, changes, remarks):
    expected = [remarks] if remarks else []
    assert load_settings(changed(tmp_path, **changes)).remarks(stage) == expected


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, True),
        ({"features": ["latent", "mae"]}, True),
        ({"features": ["latent"]}, False),
        ({"field__scale_statistic": "mean_length"}, False),
        ({"field__unit_scale": True}, False),
        ({"conventions": "wflow"}, False),
        ({"dist_metric": "l2"}, False),
    ],
    ids=str,
)
def test_a_scale_of_squares_for_several_feature_sets_is_warned_of(tmp_path, changes, warned):
    settings = load_settings(changed(tmp_path, **(SINKHORN | {"dist_metric": "l2_sq"} | changes)))
    warnings = [line for line in settings.remarks("drift") if line.startswith("warning: ")]
    assert len(warnings) == warned and not settings.remarks("mae")
    assert all("dist_metric l2_sq" in w and "-S +field.scale_statistic=mean_length" in w for w in warnings)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"sinkhorn_iters": 7}, True),
        ({"drift__lr_final": 0.5}, False),
        ({"drift__patch": 2}, True),
        ({"drift__positives": 31}, False),
        ({"field__affinity_floor": 0.0}, False),
        ({"coupling": "sinkhorn"}, False),
        ({"drift__classes_per_part": 5}, True),
    ],
    ids=str,
)
def test_only_what_has_an_effect_decides_a_run(tmp_path, changes, same):
    before = load_settings(changed(tmp_path)).deciding("drift")
    assert (load_settings(changed(tmp_path, **changes)).deciding("drift") == before) == same


def test_the_classes_of_a_part_decide_a_run_that_has_parts(tmp_path):
    two, five = (
        load_settings(changed(tmp_path, **WFLOW, drift__classes_per_part=size)).deciding("drift")
        for size in (2, 5)
    )
    assert two["field"]["classes_per_part"] == 2 and five["field"]["classes_per_part"] == 5


def test_what_is_in_force_is_everything_that_decides_with_its_defaults(tmp_path):
    settings = load_settings(changed(tmp_path, field__cost_factor=2.0))
    found = settings.in_force("drift")
    assert found["drift"]["patch"] == 2 and found["drift"]["lr"] == 0.006
    assert (found["field"]["cost_factor"], found["field"]["affinity_floor"]) == (2.0, 1e-6)
    assert found["features"] == [{"encoder": "mae", "duplicates": "drop"}]
    assert "sinkhorn_iters" not in found["field"]  # has no effect here
    assert settings.in_force("mae")["mae"].keys() == Mae.model_fields.keys()


def test_several_mistakes_are_counted(tmp_path):
    assert refusal(tmp_path, seed=-1, drift__lr=-1.0).endswith("(and 1 more)")


@pytest.mark.parametrize("text", ["a: [1, 2", "just words", "", "seed: 0\nseed: 1\n", "? [a]\n: 1\n"])
def test_what_is_not_settings_is_refused(tmp_path, text):
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_settings(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_settings(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("1E5", 1e5), (".5", 0.5), ("-2.", -2.0), ("7", 7), ("no", "no"), ("true", True),
        ("2026-01-01", "2026-01-01"), ("null", None), (".inf", float("inf")), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_values_are_read_as_dvc_reads_them(tmp_path, text, value):
    """YAML 1.2, in which `1e-6` is a number and `no` a word."""
    file = tmp_path / "params.yaml"
    file.write_text(f"key: {text}\n")
    assert read_yaml(file, "")["key"] == value
