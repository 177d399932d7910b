"""Settings: the presets are complete and right, and every mistake is one line that helps."""

import re
from pathlib import Path
from typing import Literal, get_origin, get_type_hints

import pytest
from complaints import complaint
from pydantic import ValidationError
from ruamel.yaml import YAML

from drift.data.views import VIEW_OPTIONS
from drift.field.settings import FieldSettings
from drift.runtime.errors import UserError
from drift.settings import FIELD_KEYS, load_settings

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


def changed(folder: Path, **changes) -> Path:
    """A copy of the digits preset with keys such as `drift__lr` set to a value, or removed by `...`."""
    content = YAML(typ="safe", pure=True).load(ROOT / "presets" / "digits.yaml")
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
    YAML(typ="safe", pure=True).dump(content, file)
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
    assert {path.stem for path in quoting} == {
        "imagenet256_ablation", "imagenet256_b2", "imagenet256_l2",
    }  # fmt: skip
    for path in PRESETS:
        fid = load_settings(path).fid
        if path in quoting:  # release and paper
            assert (fid.reference, fid.rounding, fid.labels, fid.images) == (
                "train",
                "down",
                "balanced",
                50_000,
            )
        elif path.stem.startswith("prior"):  # the Sinkhorn paper's code
            assert (fid.reference, fid.rounding, fid.labels, fid.images) == ("val", "down", "random", 50_000)


def test_params_yaml_is_the_digits_preset_as_shipped():
    if load_settings(ROOT / "params.yaml").data.dataset != "digits":
        pytest.skip("params.yaml holds another experiment now")
    assert {p.stem for p in PRESETS} >= {"digits", "imagenet256_ablation", "imagenet256_b2", "imagenet256_l2"}
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "presets" / "digits.yaml").read_bytes()


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
        ("encode__vae", "artifacts/latents/center/vae", "artifacts/latents"),
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


# Paper Table 8 and A.8; a second writing-down of the presets, so that a slip in either shows
PUBLISHED = {
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
}  # fmt: skip
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
    assert settings.field() == FieldSettings()


def test_field_settings_take_every_top_level_knob():
    settings = load_settings(ROOT / "presets" / "digits.yaml")
    sections = {"views", "data", "encode", "mae", "drift", "fid", "hardware"}
    knobs = set(type(settings).model_fields) - {"seed"} - sections
    assert knobs == set(FIELD_KEYS)
    words = {key: kind for key, kind in get_type_hints(FieldSettings).items() if get_origin(kind) is Literal}
    assert words == {key: type(settings).model_fields[key].annotation for key in words}


def test_settings_are_frozen():
    settings = load_settings(ROOT / "presets" / "digits.yaml")
    with pytest.raises(ValidationError):
        settings.drift.lr = 1.0


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"drift__postives": 3}, ["drift.postives", "3", "did you mean positives"]),
        ({"colour": "red"}, ["unknown key colour", "'red'"]),
        ({"drift__lr": ...}, ["missing key drift.lr", "presets/"]),
        ({"mae": ...}, ["missing key mae"]),
        ({"coupling": "sinkhron"}, ["coupling", "'sinkhron'", "row", "partial_two_sided", "sinkhorn"]),
        ({"temps": [0.02, -0.05]}, ["temps.1", "-0.05", "above 0"]),
        ({"temps": []}, ["temps", "at least 1"]),
        ({"views": ["augmented"]}, ["views = ['augmented']", "center"]),
        ({"views": ["center"]}, ["views = ['center']", "augmented (mae.view)"]),
        ({"views": ["centre"]}, ["views", "centre"]),
        ({"mae__view": "both"}, ["mae.view", "both"]),
        ({"drift__classes_per_step": 11}, ["drift.classes_per_step = 11", "data.classes (10)"]),
        ({"drift__positives": 0}, ["drift.positives", "1 or more"]),
        ({"drift__positives": 129}, ["drift.positives = 129", "queue_per_class (128)"]),
        ({"drift__steps": 10.5}, ["drift.steps", "10.5", "whole number"]),
        ({"drift__steps": True}, ["drift.steps", "True", "whole number"]),
        ({"drift__lr": "fast"}, ["drift.lr", "'fast'", "a number"]),
        ({"drift__lr": float("nan")}, ["drift.lr", "nan"]),
        ({"drift__omega_max": 0.5}, ["drift.omega_max", "0.5", "1 or more"]),
        ({"drift__heads": 5}, ["drift.heads = 5", "96"]),
        ({"drift__warmup_steps": 2000}, ["drift.warmup_steps = 2000", "steps (1200)"]),
        ({"mae__norm_groups": 5}, ["mae.norm_groups = 5", "width (16)"]),
        ({"mae__mask_ratio": 1.0}, ["mae.mask_ratio", "below 1"]),
        ({"mask_self_neg": 1}, ["mask_self_neg", "true or false"]),
        ({"data__dataset": "folder"}, ["data.root = null", "folder"]),
        ({"encode__crop_scale": [0.9, 0.2]}, ["encode.crop_scale", "smaller number first"]),
        ({"fid__ema_decays": [0.9]}, ["fid.ema_decays = [0.9]", "0.995"]),
        ({"fid__omegas": [1.0, 1]}, ["omegas = [1.0, 1.0]", "each once"]),
        ({"fid__inception": "x.pt"}, ["inception = x.pt", "features is not inception"]),
        ({"fid__reference": "a/b.npz"}, ["metrics = ", "without kid", "a/b.npz"]),
        ({"fid__metrics": ["fid"]}, ["fid.metrics.0", "precision_recall"]),
        ({"fid__omegas": [0.5]}, ["fid.omegas.0", "0.5", "1 or more"]),
        ({"seed": -1}, ["seed", "-1", "0 or more"]),
        ({"drift": 3}, ["drift = 3", "section"]),
        ({"drift__classes_per_pass": 8}, ["drift.classes_per_pass", "mean hardware.classes_per_pass?"]),
        ({"drift__coupling": "row"}, ["drift.coupling", "'row'", "did you mean coupling?"]),
        ({"drift__sampling": "random"}, ["drift.sampling", "'random'", "queue", "direct"]),
        (
            {"drift__queue_push": 64},
            ["drift.queue_push (value 64)", "is now drift.push_per_step", "all processes"],
        ),
        ({"drift__class_sampling": "host"}, ["drift.class_sampling", "'host'", "pushed", "uniform"]),
        (
            {"drift__class_sampling": "pushed", "drift__push_per_step": 9},
            ["drift.push_per_step = 9", "at least classes_per_step (10)"],
        ),
        (
            {"drift__class_sampling": "pushed", "drift__sampling": "direct"},
            ["drift.class_sampling = pushed", "uniform, where sampling is direct"],
        ),
        ({"encode__on_bad_image": "ignore"}, ["encode.on_bad_image", "'ignore'", "error", "skip"]),
        ({"mae__evaluate_every": 0}, ["mae.evaluate_every", "1 or more"]),
        ({"drift__precision": "half"}, ["drift.precision", "'half'", "bfloat16", "float16"]),
        ({"encode__precision": "float16"}, ["encode.precision", "float32 or bfloat16"]),
        (
            {"hardware__precision": "bfloat16", "mae__precision": ...},
            ["unknown key hardware.precision (value 'bfloat16')", "now mae.precision and drift.precision"],
        ),
        (
            {"hardware__vae_precision": "float32", "fid__precision": ...},
            [
                "unknown key hardware.vae_precision (value 'float32')",
                "now encode.precision and fid.precision",
            ],
        ),
        ({"hardware__mae_micro_batch": 0}, ["hardware.mae_micro_batch", "1 or more"]),
        ({"hardware__time_limit": 0}, ["hardware.time_limit", "above 0"]),
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


SINKHORN = {"coupling": "sinkhorn", "drift_form": "split"}
GUIDED = {"drift__omega_min": 1.1, "drift__no_guidance_fraction": 0.0}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (SINKHORN | {"alg2_impl": "kernel"}, ["alg2_impl is kernel", "underflow", "use alg2_impl logspace"]),
        (
            {"coupling": "sinkhorn", "sinkhorn_marginal": "post_guidance"},
            ["sinkhorn_marginal is post_guidance", "alg2_joint", "use drift_form split or"],
        ),
        (
            {"sinkhorn_agg_kernel": True},
            ["sinkhorn_agg_kernel is true", "partial_two_sided", "use coupling sinkhorn or"],
        ),
        (
            SINKHORN | {"sinkhorn_agg_kernel": True, "drift_tau_scale": True, "normalize_drift_theta": False},
            ["drift_tau_scale is true", "no temperature", "set one of them to false"],
        ),
        (
            {"drift_unit_vec": True, "dist_metric": "l2_sq"},
            ["drift_unit_vec is true", "l2_sq", "use dist_metric l2 or"],
        ),
        (
            SINKHORN | {"sinkhorn_marginal": "none"},
            ["sinkhorn_marginal = 'none'", "omega_min = 1", "weigh nothing", "set sinkhorn_marginal to"],
        ),
        (
            SINKHORN | GUIDED | {"sinkhorn_marginal": "none", "drift__no_guidance_fraction": 0.5},
            ["sinkhorn_marginal = 'none'", "no_guidance_fraction = 0.5", "weighted_cols"],
        ),
        ({"drift_tau_scale": True}, ["drift_tau_scale = true", "cancels", "set one of them to false"]),
        ({"temps": [0.02, 0.05, 0.02]}, ["temps = [0.02, 0.05, 0.02]", "each temperature once"]),
        ({"negatives": "third_batch"}, ["negatives", "'third_batch'", "self", "second_batch"]),
        ({"sinkhorn_tolerance": -1e-3}, ["sinkhorn_tolerance", "-0.001", "0 or more"]),
    ],
)
def test_knobs_that_make_no_sense_together_are_refused_with_the_reason(tmp_path, changes, wanted):
    message = refusal(tmp_path, **changes)
    for part in wanted:
        assert part in message


@pytest.mark.parametrize(
    "changes",
    [
        SINKHORN,
        SINKHORN | {"dist_metric": "l2_sq", "negatives": "second_batch"},
        SINKHORN | {"sinkhorn_marginal": "post_guidance", "sinkhorn_tolerance": 1e-3},
        SINKHORN | GUIDED | {"sinkhorn_marginal": "none"},
        SINKHORN | {"sinkhorn_marginal": "none", "drift__unconditional": 0},
        {"coupling": "sinkhorn", "sinkhorn_agg_kernel": True},
        {"drift_tau_scale": True, "normalize_drift_theta": False},
        {"alg2_impl": "kernel", "drift_form": "split", "coupling": "row"},
        {
            "drift_unit_vec": True,
            "normalization_scope": "class",
            "uncond_weighting": "logit",
            "vanilla": True,
        },
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_knobs_that_go_together(tmp_path, changes):
    field = load_settings(changed(tmp_path, **changes)).field()
    for key, value in changes.items():
        if "__" not in key:
            assert getattr(field, key) == value


def test_prior_presets_have_the_prior_field_in_the_ablation_setting():
    ablation, baseline, sinkhorn = (
        load_settings(ROOT / "presets" / f"{name}.yaml")
        for name in ("imagenet256_ablation", "prior_baseline", "prior_sinkhorn")
    )
    assert baseline.field() == FieldSettings.sinkhorn()
    assert sinkhorn.field() == FieldSettings.sinkhorn(coupling="sinkhorn", drift_form="split")
    for settings in (baseline, sinkhorn):
        assert settings.mae == ablation.mae
        assert settings.drift == ablation.drift.model_copy(update={"class_sampling": "uniform"})
        assert (settings.encode.vae, settings.encode.posterior) == ("stabilityai/sd-vae-ft-ema", "mean")
        assert settings.fid.reference == "val"


SINGLE_VIEW = {"views": ["center"], "mae__view": "center"}


@pytest.mark.parametrize(
    ("stage", "changes", "told"),
    [
        (
            "drift",
            {"coupling": "sinkhorn"},
            ["without effect here: uncond_weighting, affinity_floor, mask_self_neg (coupling is sinkhorn)"],
        ),
        (
            "drift",
            {
                "coupling": "sinkhorn",
                "self_in_scale": False,
                "uncond_weighting": "logit",
                "affinity_floor": 0.0,
            },
            [
                "without effect here: uncond_weighting (coupling is sinkhorn)",
                "mask_self_neg = true: coupling sinkhorn masks nothing (prior); only S leaves out pairs of a "
                "sample with itself",
            ],
        ),
        (
            "drift",
            {"coupling": "sinkhorn", "mask_self_neg": False, "drift__sampling": "direct"},
            [
                "without effect here: uncond_weighting, affinity_floor (coupling is sinkhorn); self_in_scale "
                "(mask_self_neg is false); drift.queue_per_class, drift.queue_global, drift.push_per_step "
                "(sampling is direct)"
            ],
        ),
        ("mae", {}, []),
        (
            "mae",
            {"mae__finetune_steps": 0, "mae__held_out": 0, "mae__lr_schedule": "constant"},
            [
                "without effect here: mae.lr_final (lr_schedule is constant); mae.finetune_weight, "
                "mae.finetune_ramp_steps (finetune_steps is 0); mae.evaluate_every (held_out is 0)"
            ],
        ),
        ("encode", {}, []),
        (
            "encode",
            SINGLE_VIEW | {"encode__flip": True, "data__root": "elsewhere"},
            [
                "without effect here: encode.crops, encode.crop_scale, encode.crop_ratio, encode.flip (views "
                "is without augmented); data.root (dataset is digits)"
            ],
        ),
        (
            "fid",
            {"fid__metrics": ["kid"]},
            [
                "without effect here: fid.precision_recall_images (metrics is without precision_recall); "
                "fid.mode (features is not inception)"
            ],
        ),
    ],
)
def test_what_has_no_effect_is_told(tmp_path, stage, changes, told):
    assert load_settings(changed(tmp_path, **changes)).remarks(stage) == told


def test_the_options_of_the_other_view_are_those_of_encode(tmp_path):
    idle = load_settings(changed(tmp_path, **SINGLE_VIEW)).without_effect()
    assert {key for key in idle if key.startswith("encode.")} == {
        f"encode.{key}" for key in VIEW_OPTIONS["augmented"]
    }


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"sinkhorn_iters": 7}, True),
        ({"drift__lr_final": 0.5}, False),
        ({"drift__positives": 31}, False),
        ({"affinity_floor": 0.0}, False),
        ({"coupling": "sinkhorn", "affinity_floor": 0.0, "mask_self_neg": False}, False),
    ],
    ids=str,
)
def test_only_what_has_an_effect_decides_a_run(tmp_path, changes, same):
    before = load_settings(changed(tmp_path)).deciding("drift")
    assert (load_settings(changed(tmp_path, **changes)).deciding("drift") == before) == same


def test_several_mistakes_are_counted(tmp_path):
    assert refusal(tmp_path, seed=-1, drift__lr=-1.0).endswith("(and 1 more)")


@pytest.mark.parametrize("text", ["a: [1, 2", "just words", "", "seed: 0\nseed: 1\n"])
def test_what_is_not_settings_is_refused(tmp_path, text):
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_settings(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_settings(tmp_path / "nowhere.yaml")


def test_numbers_are_read_as_dvc_reads_them(tmp_path):
    text = (
        (ROOT / "presets" / "digits.yaml")
        .read_text()
        .replace("affinity_floor: 1.0e-6", "affinity_floor: 1e-6")
    )
    file = tmp_path / "params.yaml"
    file.write_text(text)
    assert load_settings(file).affinity_floor == 1e-6
