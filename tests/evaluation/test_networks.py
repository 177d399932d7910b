import http.server
import io
import threading
from hashlib import sha256

import pytest
import torch
from complaints import complaint
from standins import random_port, save_inception
from torch.nn import functional as F

from drift.evaluation import networks as module
from drift.evaluation.networks import load_feature_network
from drift.models.classifier import ImageClassifier
from drift.settings import Fid

CONTENT = bytes(range(256)) * 400
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 12, 12, 3), dtype=torch.uint8, generator=generator)


def pixels(images):
    return images.permute(0, 3, 1, 2).float()


def relative_error(found, expected) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


# Downloads


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server on the loopback; returns what makes one of its pages the address of Inception.

    `/whole.pt` is CONTENT, and `/short.pt` breaks off in the middle; PyTorch's cache is empty.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/nothing.pt":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT if self.path == "/whole.pt" else CONTENT[: len(CONTENT) // 2])

        def log_message(self, *args):
            pass

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setitem(module._INCEPTION_DIGESTS, "clean", sha256(CONTENT).hexdigest())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{httpd.server_port}"
        yield lambda page: monkeypatch.setattr("cleanfid.downloads_helper.inception_url", f"{address}/{page}")
        httpd.shutdown()


def test_inception_is_downloaded_once_and_nothing_is_left_of_a_broken_download(server, tmp_path):
    cache = tmp_path / "checkpoints"
    for page in ("short.pt", "nothing.pt"):
        server(page)
        message = complaint(lambda: module._download_inception("clean"))
        assert page in message and str(cache) in message and "fid.inception" in message
        assert list(cache.iterdir()) == []
    server("whole.pt")
    path = module._download_inception("clean")
    assert path.read_bytes() == CONTENT and list(cache.iterdir()) == [path]
    path.write_bytes(CONTENT[:100])
    assert "damaged" in complaint(lambda: module._download_inception("clean"))
    assert path.read_bytes() == CONTENT[:100]  # it is there: no download


def test_a_file_in_the_way_names_the_setting_that_goes_round_it(tmp_path, monkeypatch):
    """Of another user, who may not let it be deleted."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    path = tmp_path / "checkpoints/inception-2015-12-05.pt"
    path.parent.mkdir()
    path.symlink_to(path)  # which not even root can open, as it can any file of mode 0600
    message = complaint(lambda: load_feature_network(Fid()))
    assert str(path) in message and "name a copy of Inception's weights in fid.inception" in message


def test_inception_is_kept_in_a_cache_of_the_user(tmp_path, monkeypatch):
    """Not in clean-fid's /tmp, where another user's file may be in the way."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for mode, name in (
        ("clean", "inception-2015-12-05.pt"),
        ("legacy_pytorch", "pt_inception-2015-12-05-6726825d.pth"),
    ):
        url, path = module._inception_file(mode)
        assert path == tmp_path / "hub" / "checkpoints" / name
        assert url.startswith("https://") and url.endswith(name)
    assert module._INCEPTION_DIGESTS["legacy_pytorch"] in name


# Networks


def test_unknown_networks_are_refused(tmp_path):
    for name, told in (("no_such_folder", "there is no such folder"), ("gone.pt", "there is no such file")):
        message = complaint(lambda name=name: load_feature_network(Fid(features=str(tmp_path / name))))
        assert f"{name}: {told}" in message


def test_inception_from_the_cache_gives_features_and_logits_without_the_bias(
    tmp_path, monkeypatch, images, capsys
):
    """That its distances are clean-fid's in every mode, tests of the sweep say."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    path = tmp_path / "checkpoints/inception-2015-12-05.pt"
    path.parent.mkdir()
    save_inception(path)
    digest = sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(module._INCEPTION_DIGESTS, "legacy_tensorflow", digest)
    network = load_feature_network(Fid(mode="legacy_tensorflow"))
    assert (network.name, network.dimension, network.published) == ("inception", 2048, True)
    assert not capsys.readouterr().out
    found, script = network(images), torch.jit.load(path)
    assert found.shape == (5, 2048) and found.dtype == torch.float32
    assert relative_error(found, script(pixels(images), return_features=True)) < 1e-3
    probabilities = script(pixels(images), no_output_bias=True)
    assert relative_error(network.logits(found).softmax(1), probabilities) < 1e-5


def test_a_local_copy_of_inception_and_what_is_not_the_published_file(tmp_path, capsys):
    def load(name, mode="clean"):
        return load_feature_network(Fid(mode=mode, inception=str(tmp_path / name)))

    save_inception(tmp_path / "mine.pt")
    network = load("mine.pt")
    assert network.published is False and "not the published file" in capsys.readouterr().out
    assert load("mine.pt", "legacy_tensorflow").digest != network.digest
    (tmp_path / "folder.pt").mkdir()
    for name, told in (("gone.pt", "there is no such file"), ("folder.pt", "cannot be read")):
        assert f"fid.inception = {tmp_path / name}: {told}" in complaint(lambda name=name: load(name))
    old = io.BytesIO()  # the published file of pytorch-fid is of this format
    torch.save({"fc.weight": torch.zeros(3)}, old, _use_new_zipfile_serialization=False)
    for content in (b"no network", b"", old.getvalue()[:1], old.getvalue()[:100]):
        (tmp_path / "bad.pt").write_bytes(content)
        for mode in ("clean", "legacy_pytorch"):
            message = complaint(lambda mode=mode: load("bad.pt", mode))
            assert f"fid.inception = {tmp_path}/bad.pt: damaged, or not Inception" in message


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_the_pytorch_port_is_cleanfids(tmp_path, images, prefix):
    """Against the whole network with the same random weights, its last layer included."""
    whole = random_port()
    weights = {prefix + name: tensor for name, tensor in whole.state_dict().items()}
    torch.save(weights, tmp_path / "port.pth")
    network = load_feature_network(Fid(mode="legacy_pytorch", inception=str(tmp_path / "port.pth")))
    with torch.no_grad():
        resized = F.interpolate(pixels(images), (299, 299), mode="bilinear", align_corners=False)
        logits = whole(2 * (resized.clamp(0, 255) / 255) - 1)
    found = network(images)
    assert found.shape == (5, 2048)
    assert relative_error(network.logits(found) + whole.fc.bias, logits) < 1e-4


def test_any_torchscript_file(tmp_path, images):
    class Colours(torch.nn.Module):
        image_size: int

        def __init__(self):
            super().__init__()
            self.image_size = 12

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    path = str(tmp_path / "colours.pt")
    torch.jit.script(Colours()).save(path)
    network = load_feature_network(Fid(features=path))
    assert (network.dimension, network.classify, network.published) == (3, None, None)
    torch.testing.assert_close(network(images), images.float().mean((1, 2)))
    (tmp_path / "bad.ts").write_bytes(b"no network")
    bad = Fid(features=str(tmp_path / "bad.ts"))
    assert "bad.ts: damaged or not TorchScript" in complaint(lambda: load_feature_network(bad))
    torch.jit.script(torch.nn.Identity()).save(path)
    assert "gives [1, 3, 299, 299]" in complaint(lambda: load_feature_network(Fid(features=path)))


@torch.no_grad()
def test_a_classifier_sees_resized_pixels_in_float32(tmp_path, images):
    torch.manual_seed(0)
    model = ImageClassifier(image_size=12, num_classes=4).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)  # features of order 1 without any training
    model.save_pretrained(tmp_path)
    network = load_feature_network(Fid(features=str(tmp_path)), workers=3)
    expected = model.features(pixels(images))
    with torch.autocast("cpu", torch.bfloat16):  # mixed precision of a caller changes nothing
        found = network(images)
    assert found.shape == (5, network.dimension) and network.labels
    assert relative_error(found, expected) < 1e-5
    assert torch.equal(network.logits(found), model.logits(found))
    large = images.repeat_interleave(3, 1).repeat_interleave(2, 2)  # [5, 36, 24, 3]
    how = {"mode": "bicubic", "antialias": True, "align_corners": False}
    resized = F.interpolate(pixels(large), (12, 12), **how).clamp(0, 255)
    assert relative_error(network(large), model.features(resized)) < 1e-3

    assert load_feature_network(Fid(features=str(tmp_path))).digest == network.digest
    next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path)
    assert load_feature_network(Fid(features=str(tmp_path))).digest != network.digest
