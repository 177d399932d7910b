import json

import pytest
import torch
from complaints import complaint
from safetensors.torch import load_file, save_file

from drift.models.generator import Generator, GeneratorConfig
from drift.models.mae import LatentMAE, MAEConfig
from drift.runtime.files import without_wrappers

MODELS = {
    LatentMAE: MAEConfig(in_channels=3, base_channels=8, layers=(1, 1, 1, 1), num_classes=5, norm_groups=4),
    Generator: GeneratorConfig(
        in_channels=3, input_size=4, num_classes=5, hidden_size=16, depth=1, num_heads=2, style_codebooks=2
    ),
}


@pytest.fixture(params=MODELS, ids=lambda cls: cls.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param(MODELS[request.param])


def assert_same_weights(found, expected):
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = type(model).from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert not loaded.training
    assert_same_weights(loaded, model)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_loading_draws_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    type(model).from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_models_give_equal_bytes(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    type(model).from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for _ in range(9):  # a hash table's order would show
        model.save_pretrained(tmp_path / "b")
        assert (tmp_path / "b/model.safetensors").read_bytes() == (
            tmp_path / "a/model.safetensors"
        ).read_bytes()
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files.keys() == {"config.json", "model.safetensors"}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}


def test_several_weights_share_a_folder(model, tmp_path):
    other = type(model)(model.config)
    model.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path, weights="ema_0.9995")
    assert_same_weights(type(model).from_pretrained(tmp_path), model)
    assert_same_weights(type(model).from_pretrained(tmp_path, weights="ema_0.9995"), other)
    message = complaint(lambda: type(model).from_pretrained(tmp_path, weights="ema_0.5"))
    assert "ema_0.5.safetensors" in message and "ema_0.9995, model" in message


def test_half_precision_weights_are_loaded_in_float32(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_weights(loaded, model.bfloat16().float())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrappers_are_taken_off(model, tmp_path, prefix):
    model.save_pretrained(tmp_path)
    save_file({prefix + k: v for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert_same_weights(type(model).from_pretrained(tmp_path), model)
    one = dict([next(iter(model.state_dict().items()))])
    twice = model.state_dict() | {prefix + name: tensor + 1 for name, tensor in one.items()}
    save_file(twice, tmp_path / "model.safetensors")
    assert "twice" in complaint(lambda: type(model).from_pretrained(tmp_path))


def test_names_that_real_wrappers_make():
    model = LatentMAE(MODELS[LatentMAE])
    names = model.state_dict().keys()
    model.encoder = torch.compile(torch.nn.Sequential(model.encoder)[0])  # within, not around
    outside = torch.nn.DataParallel(torch.compile(model)).state_dict()
    assert outside.keys() != names and any(".encoder._orig_mod." in name for name in outside)
    assert without_wrappers(outside).keys() == names


def test_channels_last_models_can_be_saved(tmp_path):
    torch.manual_seed(0)
    model = LatentMAE(MODELS[LatentMAE]).to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    assert_same_weights(LatentMAE.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.9, 0.9999])
def test_truncated_weights(model, tmp_path, share):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = complaint(lambda: type(model).from_pretrained(tmp_path))
    assert str(path) in message and "damaged" in message


def test_a_changed_bit_is_found(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    message = complaint(lambda: type(model).from_pretrained(tmp_path))
    assert message.startswith(f"{path}: damaged (the weights are not those that were written)")


def test_weights_of_another_shape(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_classes": 5', '"num_classes": 7'))
    message = complaint(lambda: type(model).from_pretrained(tmp_path))
    name = {LatentMAE: "classifier.bias", Generator: "class_embedding.weight"}[type(model)]
    shape = list(model.get_parameter(name).shape)
    assert f"parameter {name} is {shape} where config.json makes it {[7, *shape[1:]]}" in message
    assert str(tmp_path / "model.safetensors") in message


@pytest.mark.parametrize("change", ["lost", "added"])
def test_weights_of_other_names(model, tmp_path, change):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name, value = next(iter(tensors.items()))
    if change == "lost":
        del tensors[name]
        expected = f"parameter {name} is absent where config.json makes it {list(value.shape)}"
    else:
        tensors["a.new.one"] = value.clone()
        expected = f"parameter a.new.one is {list(value.shape)} where config.json makes it absent"
    save_file(tensors, path)
    assert expected in complaint(lambda: type(model).from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c | {"colour": 3}, "unknown key colour"),
        (lambda c: {k: v for k, v in c.items() if k != "num_classes"}, "num_classes is missing"),
        (lambda c: c | {"num_classes": "5"}, "num_classes is '5' where int is wanted"),
        (lambda c: c | {"num_classes": True}, "num_classes is True"),
        (lambda c: c | {"num_classes": 0}, "num_classes is 0"),
        (lambda c: c | {"model": "Other"}, "not the config of a"),
        (lambda c: [c], "not the config of a"),
    ],
)
def test_wrong_configs(model, tmp_path, change, named):
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    message = complaint(lambda: type(model).from_pretrained(tmp_path))
    assert str(path) in message and named in message


def test_missing_and_damaged_files(model, tmp_path):
    load = type(model).from_pretrained
    assert "no such folder" in complaint(lambda: load(tmp_path / "nowhere"))
    assert "config.json: cannot be read" in complaint(lambda: load(tmp_path))
    (tmp_path / "config.json").write_text('{"model": ')
    assert "config.json: damaged" in complaint(lambda: load(tmp_path))
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    assert "config.json: damaged" in complaint(lambda: load(tmp_path))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "model.safetensors: is missing" in complaint(lambda: load(tmp_path))
