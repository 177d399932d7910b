import json
import shutil

import msgpack
import numpy as np
import pytest
import torch
from complaints import complaint
from golden_weights import GOLDEN, golden_config, golden_numbers, golden_params, relative_error

from drift.interop import import_release
from drift.interop.release import convert_generator, convert_mae, read_flax_msgpack
from drift.models.generator import Generator
from drift.models.mae import LatentMAE

CONVERT = {"release_mae": convert_mae, "release_generator": convert_generator}


def flax_array(array, code=1, dtype=None):
    """One array as Flax packs it."""
    content = (array.shape, dtype or array.dtype.name, array.tobytes())
    return msgpack.ExtType(code, msgpack.packb(content))


def flax_tree(params, split=()):
    """A nested tree as Flax packs it; the arrays whose path is in `split` as if they were over 1 GiB."""
    tree = {}
    for path, array in params.items():
        *words, last = path.split("/")
        branch = tree
        for word in words:
            branch = branch.setdefault(word, {})
        branch[last] = flax_array(array)
        if path in split:
            chunks = np.array_split(array.reshape(-1), 12)  # more than ten: "10" sorts before "2"
            branch[last] = {
                "__msgpack_chunked_array__": True,
                "shape": {str(i): size for i, size in enumerate(array.shape)},
                "chunks": {str(i): flax_array(chunk) for i, chunk in enumerate(chunks)},
            }
    return tree


def write_release(folder, kind, model_config, tree):
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"kind": kind, "model_config": model_config}))
    (folder / "ema_params.msgpack").write_bytes(msgpack.packb(tree))
    return folder


def golden_tensors(folder):
    return {name: torch.from_numpy(array) for name, array in golden_numbers(folder).items()}


@torch.no_grad()
def test_generator_from_the_file_of_the_release(tmp_path):
    import_release(GOLDEN / "release_generator", tmp_path)
    model = Generator.from_pretrained(tmp_path)
    numbers = golden_tensors("release_generator")
    conditions = numbers["labels"], numbers["omega"], numbers["style_indices"]
    latent = model(numbers["noise"].permute(0, 3, 1, 2), *conditions)
    assert relative_error(latent.permute(0, 2, 3, 1), numbers["latent"]) < 1e-4


@pytest.mark.parametrize("folder", ["release_mae", "release_mae_pixel"])
@torch.no_grad()
def test_mae_from_files(folder, tmp_path):
    tree = flax_tree(golden_params(folder), split={"encoder/conv1/kernel"})
    source = write_release(tmp_path / "source", "mae", golden_config(folder), tree)
    import_release(source, tmp_path / "ours")
    model, numbers = LatentMAE.from_pretrained(tmp_path / "ours"), golden_tensors(folder)
    reconstruction, logits = model.reconstruct(numbers["x"].permute(0, 3, 1, 2))
    assert relative_error(reconstruction.permute(0, 2, 3, 1), numbers["recon"]) < 1e-4
    assert relative_error(logits, numbers["logits"]) < 1e-4


def test_encodings_of_flax(tmp_path):
    exact = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    brain = exact.bfloat16()
    tree = {
        "brain": flax_array(brain.view(torch.uint16).numpy(), dtype="bfloat16"),
        "half": flax_array(exact.half().numpy()),
        "double": flax_array(exact.double().numpy()),
        "scalar": flax_array(np.float32(2.5), code=3),
    }
    (tmp_path / "x").write_bytes(msgpack.packb({"a": tree}))
    read = read_flax_msgpack(tmp_path / "x")
    for name, expected in (("brain", brain.float()), ("half", exact.half()), ("double", exact.double())):
        np.testing.assert_array_equal(read[f"a/{name}"], expected.numpy())
    assert read["a/scalar"].shape == () and read["a/scalar"] == 2.5


@pytest.mark.parametrize("folder", CONVERT)
def test_arrays_that_do_not_fit(folder):
    params, config, convert = golden_params(folder), golden_config(folder), CONVERT[folder]

    def refused(changed):
        return complaint(lambda: convert(changed, config))

    for path, array in list(params.items())[::5]:
        shape = list(array.shape)
        without = {other: value for other, value in params.items() if other != path}
        assert f"parameter {path} is absent where model_config makes it {shape}" in refused(without)
        longer = params | {path: np.concatenate([array, array])}
        assert f"parameter {path} is {[2 * shape[0], *shape[1:]]}" in refused(longer)
    assert "a/new/kernel is [2, 2]" in refused(params | {"a/new/kernel": np.zeros((2, 2), np.float32)})
    assert f"{path} is int32" in refused(params | {path: np.zeros(array.shape, np.int32)})


@pytest.mark.parametrize(
    ("folder", "change", "named"),
    [
        ("release_mae", {"stem_stride": 2}, "unknown key stem_stride"),
        ("release_mae", {"layers": 4}, "layers is 4"),
        ("release_mae", {"layers": [2, 1, 1, 2]}, "encoder/stages_3/layers_1/conv1/kernel is absent"),
        ("release_generator", {"use_rope": False}, "use_rope = False; only True"),
        ("release_generator", {"cond_dim": 64}, "cond_dim = 64; only 32"),
        ("release_generator", {"out_channels": 8}, "out_channels = 8; only 4"),
        ("release_generator", {"depth": 3}, "LightningDiT_0/blocks_2/Attention_0"),
        ("release_generator", {"noise_coords": 5}, "noise_embeds_4/embedding is absent"),
        ("release_generator", {"noise_classes": 9}, "noise_embeds_0/embedding is [8, 32]"),
    ],
)
def test_model_configs_that_do_not_fit(folder, change, named):
    config = golden_config(folder) | change
    assert named in complaint(lambda: CONVERT[folder](golden_params(folder), config))


# What changes no number, and what the arrays show: the trainer writes no num_classes for an MAE
MAY_BE_ABSENT = {
    "release_mae": {"dropout_prob", "use_bf16", "num_classes"},
    "release_generator": {
        "use_bf16", "attn_fp32", "use_remat",
        "num_classes", "cond_dim", "out_channels", "use_qknorm", "use_swiglu", "use_rmsnorm",
    },
}  # fmt: skip


@pytest.mark.parametrize("folder", CONVERT)
def test_model_configs_with_a_key_missing(folder):
    config, params = golden_config(folder), golden_params(folder)
    whole = CONVERT[folder](params, config).state_dict()
    for key in config:
        without = {other: value for other, value in config.items() if other != key}
        if key in MAY_BE_ABSENT[folder]:
            found = CONVERT[folder](params, without).state_dict()
            assert found.keys() == whole.keys() and all(
                torch.equal(found[name], whole[name]) for name in whole
            )
        else:
            said = complaint(lambda without=without: CONVERT[folder](params, without))
            assert f"lacks the key {key}" in said


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights(tmp_path, share):
    source = shutil.copytree(GOLDEN / "release_generator" / "params_ema", tmp_path / "source")
    path = source / "ema_params.msgpack"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = complaint(lambda: import_release(source, tmp_path / "ours"))
    assert f"{path}: damaged" in message and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"not msgpack at all",
        msgpack.packb([1, 2]),
        msgpack.packb({"a": 3}),
        msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([2, 2], "float32", b"1234")))}),
        msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([1], "object", b"12345678")))}),
        msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(3))}),
        msgpack.packb({"a": msgpack.ExtType(2, msgpack.packb((1.0, 2.0)))}),
        msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"1": 3}}}),
    ],
)
def test_files_that_are_not_flax(tmp_path, content):
    path = tmp_path / "x.msgpack"
    path.write_bytes(content)
    assert str(path) in complaint(lambda: read_flax_msgpack(path))


def test_wrong_folders(tmp_path):
    def refused():
        return complaint(lambda: import_release(tmp_path, tmp_path / "ours"))

    assert "metadata.json: is missing" in refused()
    metadata = tmp_path / "metadata.json"
    metadata.write_text("{}")
    assert "ema_params.msgpack: is missing" in refused()
    (tmp_path / "ema_params.msgpack").write_bytes(b"")
    for text, named in (
        ("{}", "no 'kind'"),
        ("[]", "damaged"),
        ('{"kind": "mae"}', "no 'model_config'"),
        ('{"kind": "vae", "model_config": {}}', "kind is 'vae'"),
    ):
        metadata.write_text(text)
        assert f"{metadata}: " in refused() and named in refused()
    assert not (tmp_path / "ours").exists()
