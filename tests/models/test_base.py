"""Folders of models: what is written is read again, by former names too; what does not fit is one line."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from complaints import complaint
from safetensors.torch import load_file, save_file

from drift.models import Generator, LatentMAE, SinkhornMAE
from drift.models.base import CONFIG_FILE, WEIGHTS_FILE, model_files
from drift.models.ema import ema_variant
from drift.runtime.files import without_wrappers

MAE = {"in_channels": 3, "base_channels": 8, "layers": (1, 1, 1, 1), "num_classes": 5, "norm_groups": 4}
GENERATOR = {
    "in_channels": 3, "input_size": 4, "num_classes": 5, "hidden_size": 16, "depth": 1, "num_heads": 2,
    "style_codebooks": 2,
}  # fmt: skip


def make(cls, seed=0):
    torch.manual_seed(seed)
    return cls(**(GENERATOR if cls is Generator else MAE))


@pytest.fixture(params=[LatentMAE, Generator], ids=lambda cls: cls.__name__)
def model(request):
    return make(request.param)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_same(found, expected):
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())


def edit(folder, change):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def write_former(model, folder, name, copies):
    """As the first version wrote it."""
    folder.mkdir()
    sizes = {key: value for key, value in model.config.items() if key[0] != "_"}
    (folder / CONFIG_FILE).write_text(json.dumps({"model": name, **sizes}))
    for copy, state in copies.items():
        save_file(state, folder / f"{copy}.safetensors", metadata={"sha256": "0" * 64})


def test_round_trip_draws_nothing_and_gives_equal_bytes(model, folder, tmp_path):
    before = torch.get_rng_state()
    loaded = type(model).from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / at).iterdir()} for at in ("model", "again")
    ]
    assert files[0] == files[1] and files[0].keys() == {CONFIG_FILE, WEIGHTS_FILE}


def test_copies_of_the_weights_share_a_folder(model, folder):
    decays = [0.999, 0.9995, 0.5]
    names = [ema_variant(decays, decay) for decay in decays]
    assert names == [None, "ema_09995", "ema_05"]
    other = make(type(model), seed=1)
    other.save_pretrained(folder, variant="ema_09995")
    for main in (None, "model"):
        assert_same(type(model).from_pretrained(folder, variant=main), model)
    for variant in ("ema_09995", "ema_0.9995"):
        assert_same(type(model).from_pretrained(folder, variant=variant), other)
        assert [path.name for path in model_files(folder, variant)] == [
            CONFIG_FILE, "diffusion_pytorch_model.ema_09995.safetensors"
        ]  # fmt: skip
    message = complaint(lambda: type(model).from_pretrained(folder, variant="ema_05"))
    assert "diffusion_pytorch_model.ema_05.safetensors: is missing" in message and "ema_09995" in message


@pytest.mark.parametrize("variant", [None, "half"])
def test_shards_are_read(model, tmp_path, variant):
    model.save_pretrained(tmp_path, max_shard_size="10KB", variant=variant)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(type(model).from_pretrained(tmp_path, variant=variant), model)
    next(tmp_path.glob("*-00002-of-*")).unlink()
    assert "Missing key" in complaint(lambda: type(model).from_pretrained(tmp_path, variant=variant))


def test_folders_of_the_first_version_are_read(model, tmp_path):
    other = make(type(model), seed=1)
    copies = {"model": model.state_dict(), "ema_0.9995": other.state_dict()}
    write_former(model, tmp_path / "former", type(model).__name__, copies)
    assert_same(type(model).from_pretrained(tmp_path / "former"), model)
    for variant in ("ema_0.9995", "ema_09995"):
        assert_same(type(model).from_pretrained(tmp_path / "former", variant=variant), other)
    other.save_pretrained(tmp_path / "former")  # over it: the new files count
    assert_same(type(model).from_pretrained(tmp_path / "former"), other)


def test_the_sinkhorn_encoder_of_the_first_version_is_read(tmp_path):
    encoder = SinkhornMAE(in_channels=3, base_channels=8, layers=(1, 1, 1, 1))
    write_former(encoder, tmp_path / "former", "PriorMAE", {"model": encoder.state_dict()})
    edit(tmp_path / "former", lambda c: c | {"num_classes": 0, "input_patch_size": 1})
    loaded = LatentMAE.from_pretrained(tmp_path / "former")
    assert type(loaded) is SinkhornMAE
    assert_same(loaded, encoder)


def test_half_precision_files_and_models(model, folder):
    path = folder / WEIGHTS_FILE
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    assert_same(type(model).from_pretrained(folder), model.bfloat16().float())
    assert type(model).from_pretrained(folder, torch_dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrappers_are_taken_off(model, folder, prefix):
    save_file({prefix + name: value for name, value in model.state_dict().items()}, folder / WEIGHTS_FILE)
    assert_same(type(model).from_pretrained(folder), model)
    name, tensor = next(iter(model.state_dict().items()))
    save_file(model.state_dict() | {prefix + name: tensor + 1}, folder / WEIGHTS_FILE)
    assert "twice" in complaint(lambda: type(model).from_pretrained(folder))


def test_names_that_real_wrappers_make():
    model = make(LatentMAE)
    names = model.state_dict().keys()
    model.encoder = torch.compile(torch.nn.Sequential(model.encoder)[0])  # within, not around
    outside = torch.nn.DataParallel(torch.compile(model)).state_dict()
    assert outside.keys() != names and any(".encoder._orig_mod." in name for name in outside)
    assert without_wrappers(outside).keys() == names


def test_channels_last_models_can_be_saved(tmp_path):
    model = make(LatentMAE).to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    assert_same(LatentMAE.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_weights_have_the_permissions_of_other_new_files(model, tmp_path, umask):
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "model", variant="ema_0999")
    finally:
        os.umask(before)
    files = list((tmp_path / "model").iterdir())
    assert len(files) == 2 and {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


def weights(change):
    def apply(folder):
        path = folder / WEIGHTS_FILE
        save_file(change(load_file(path)), path)

    return apply


def config(change):
    return lambda folder: edit(folder, change)


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        (WEIGHTS_FILE, weights(lambda w: dict(list(w.items())[1:])), "Missing key(s)"),
        (WEIGHTS_FILE, weights(lambda w: w | {"a.new.one": torch.zeros(1)}), "a.new.one"),
        (WEIGHTS_FILE, weights(lambda w: {k: torch.stack([v, v]) for k, v in w.items()}), "size mismatch"),
        (CONFIG_FILE, config(lambda c: c | {"colour": 3}), "unknown key colour"),
        (CONFIG_FILE, config(lambda c: {k: c[k] for k in c if k != "num_classes"}), "num_classes is missing"),
        (CONFIG_FILE, config(lambda c: c | {"num_classes": "5"}), "num_classes is '5'"),
        (CONFIG_FILE, config(lambda c: c | {"num_classes": True}), "num_classes is True"),
        (CONFIG_FILE, config(lambda c: c | {"num_classes": 0}), "num_classes is 0"),
        (CONFIG_FILE, config(lambda c: c | {"_class_name": "Other"}), "not the config of a"),
        (CONFIG_FILE, config(lambda c: [c]), "not the config of a"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model, folder, file, damage, named):
    damage(folder)
    message = complaint(lambda: type(model).from_pretrained(folder))
    assert named in message and str(folder / file) in message


def test_missing_and_damaged_files(model, folder):
    load, whole = type(model).from_pretrained, (folder / WEIGHTS_FILE).read_bytes()
    for share in (0.0, 0.001, 0.1, 0.9999):
        (folder / WEIGHTS_FILE).write_bytes(whole[: int(share * len(whole))])
        assert f"{folder / WEIGHTS_FILE}: damaged" in complaint(lambda: load(folder))
    (folder / WEIGHTS_FILE).unlink()
    assert f"{WEIGHTS_FILE}: is missing" in complaint(lambda: load(folder))
    for content in (b'{"_class_name": ', b"\xff\xfe"):
        (folder / CONFIG_FILE).write_bytes(content)
        assert f"{CONFIG_FILE}: missing or damaged" in complaint(lambda: load(folder))
    shutil.rmtree(folder)
    assert "no such folder" in complaint(lambda: load(folder))


def test_hub_ids_go_through_the_hub(model, folder, monkeypatch):
    def snapshot_download(repository, *, revision, allow_patterns, token):
        assert (repository, revision, token) == ("someone/model", "main", "secret")
        assert len(allow_patterns) == 2
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same(type(model).from_pretrained("someone/model", revision="main", token="secret"), model)
