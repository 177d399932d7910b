"""The encoder of the Sinkhorn paper's code against its numbers, through the importer."""

import numpy as np
import pytest
import torch
from complaints import complaint
from golden_weights import GOLDEN, relative_error

from drift.interop import import_sinkhorn_mae
from drift.models.mae import LatentMAE, draw_mask
from drift.models.sinkhorn_mae import SinkhornMAE

CHECKPOINT = GOLDEN / "prior_mae" / "ckpt_final.pt"


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "prior_mae" / "expected.npz") as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    import_sinkhorn_mae(CHECKPOINT, folder)
    loaded = LatentMAE.from_pretrained(folder)
    assert isinstance(loaded, SinkhornMAE)
    return loaded


@torch.no_grad()
def test_maps_sets_and_reconstruction_are_those_of_the_paper(model, expected):
    x = expected["x"]
    sets = model.encode(x)
    assert {f"set/{name}" for name in sets} == {name for name in expected if name.startswith("set/")}
    for name, found in sets.items():
        assert found.shape == expected[f"set/{name}"].shape
        assert relative_error(found, expected[f"set/{name}"]) < 1e-5, name
    reconstruction, logits = model.reconstruct(x)
    assert relative_error(reconstruction, expected["recon"]) < 1e-5
    assert logits.shape == (2, 0)


@torch.no_grad()
def test_masked_error_is_that_of_masked_places(model, expected):
    x = expected["x"]
    mask = draw_mask((2, 8, 8), 0.5, torch.Generator().manual_seed(0))
    hidden = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    reconstruction, _ = model.reconstruct(torch.where(hidden, 0, x))
    found, _ = model(x, mask)
    for b in range(2):
        wanted = (reconstruction[b] - x[b])[:, hidden[b, 0]].square().sum(dim=0).mean()
        torch.testing.assert_close(found[b], wanted)


def test_sets_that_repeat_others_can_be_left_out(model):
    with torch.no_grad():
        all_sets = model.encode(torch.randn(2, 4, 16, 16))
        fewer = model.encode(torch.randn(2, 4, 16, 16), drop_duplicates=True)
    assert all_sets.keys() - fewer.keys() == {"enc02.patch4_ms", "enc03.patch4_ms", "enc04.patch2_ms"}


def changed(tmp_path, change):
    content = torch.load(CHECKPOINT, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "ckpt_final.pt")
    return tmp_path / "ckpt_final.pt"


class Stranger:
    def __reduce__(self):
        return (print, ("executed",))


REFUSED = {
    "lacks a weight": (lambda c: c["ema"]["shadow"].pop("decoder.out.bias"), "decoder.out.bias"),
    "has one more": (lambda c: c["ema"]["shadow"].update(more=torch.zeros(1)), "more"),
    "shape": (lambda c: c["ema"]["shadow"].update({"encoder.gn1.bias": torch.zeros(5)}), "encoder.gn1.bias"),
    "another width": (lambda c: c["mae_cfg"].update(base_width=8), "decoder"),
    "a stride": (lambda c: c["mae_cfg"].update(conv1_stride=2), "conv1_stride"),
    "an unknown key": (lambda c: c["mae_cfg"].update(attention=True), "attention"),
    "a missing key": (lambda c: c["mae_cfg"].pop("in_ch"), "in_ch"),
    "no EMA": (lambda c: c.pop("ema"), "ema.shadow"),
    "wrong blocks": (lambda c: c["mae_cfg"].update(blocks_per_stage="many"), "layers"),
    "two stages": (lambda c: c["mae_cfg"].update(blocks_per_stage=[1, 1]), "layers"),
    "33 channels": (lambda c: c["mae_cfg"].update(base_width=33), "base_channels is 33"),
    "an object": (lambda c: c.update(mae_cfg=Stranger()), "executing"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(what, tmp_path, capsys):
    change, named = REFUSED[what]
    path = changed(tmp_path, change)
    message = complaint(lambda: import_sinkhorn_mae(path, tmp_path / "out"))
    assert str(path) in message and named in message
    assert not list((tmp_path / "out").glob("*")) and "executed" not in capsys.readouterr().out


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "ckpt_final.pt"
    for content in (None, b"not a checkpoint", CHECKPOINT.read_bytes()[:100_000]):
        if content:
            path.write_bytes(content)
        assert str(path) in complaint(lambda: import_sinkhorn_mae(path, tmp_path / "out"))
    torch.save([1, 2], path)
    assert str(path) in complaint(lambda: import_sinkhorn_mae(path, tmp_path / "out"))


def test_half_precision_weights_of_a_wrapped_model_are_taken(tmp_path, expected):
    """As they are called if the model was compiled in DistributedDataParallel."""

    def wrap(content):
        shadow = content["ema"]["shadow"]
        content["ema"]["shadow"] = {f"module._orig_mod.{name}": w.half() for name, w in shadow.items()}

    model = import_sinkhorn_mae(changed(tmp_path, wrap), tmp_path / "out")
    with torch.no_grad():
        reconstruction = model.reconstruct(expected["x"])[0]
    assert reconstruction.dtype == torch.float32
    assert relative_error(reconstruction, expected["recon"]) < 5e-3
