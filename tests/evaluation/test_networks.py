import http.server
import io
import socket
import threading
import time
from hashlib import sha256

import pytest
import torch
from standins import random_port, save_inception
from torch.nn import functional as F

from drift.evaluation import networks as features
from drift.evaluation.networks import check_feature_network, fetch, load_feature_network
from drift.models.classifier import ImageClassifier
from drift.runtime.errors import UserError

CONTENT = bytes(range(256)) * 400
DIGEST = sha256(CONTENT).hexdigest()


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (5, 12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture
def server():
    """A web server on the loopback whose `/whole` is CONTENT and whose `/short` breaks off in the middle."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/nothing":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT if self.path == "/whole" else CONTENT[: len(CONTENT) // 2])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture
def silent_port():
    """A port of the loopback that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def refused_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_fetch_downloads_once(server, tmp_path):
    path = tmp_path / "cache" / "weights.pt"
    fetch(f"{server}/whole", path, DIGEST)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["weights.pt"]
    fetch(f"http://127.0.0.1:{refused_port()}/whole", path, DIGEST[:8])  # it is there: no connection


@pytest.mark.parametrize("page", ["short", "nothing"])
def test_a_broken_download_leaves_nothing_behind(server, tmp_path, page):
    path = tmp_path / "weights.pt"
    with pytest.raises(UserError) as error:
        fetch(f"{server}/{page}", path, DIGEST)
    assert str(path) in one_line(error) and f"{server}/{page}" in one_line(error)
    assert list(tmp_path.iterdir()) == []
    fetch(f"{server}/whole", path, DIGEST)
    assert path.read_bytes() == CONTENT


def test_a_refused_connection_is_one_line(tmp_path):
    url = f"http://127.0.0.1:{refused_port()}/whole"
    with pytest.raises(UserError, match="refused") as error:
        fetch(url, tmp_path / "weights.pt", DIGEST)
    assert f"get {url} where there is a network" in one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_a_silent_server_is_given_up(silent_port, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CONNECT_TIMEOUT", 0.3)
    start = time.monotonic()
    with pytest.raises(UserError, match="timed out"):
        fetch(f"http://127.0.0.1:{silent_port}/whole", tmp_path / "weights.pt", DIGEST)
    assert time.monotonic() - start < 10
    assert socket.getdefaulttimeout() is None
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named_and_kept(server, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(CONTENT[:100])
    with pytest.raises(UserError, match="damaged") as error:
        fetch(f"{server}/whole", path, DIGEST)
    assert str(path) in one_line(error)
    assert path.read_bytes() == CONTENT[:100]


@pytest.mark.parametrize("page", ["unreadable", "cut short"])
def test_a_file_in_the_way_names_the_setting_that_goes_round_it(tmp_path, monkeypatch, page):
    """Of another user, or cut short; whoever meets it may not be allowed to delete it."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    path = tmp_path / "checkpoints/inception-2015-12-05.pt"
    path.parent.mkdir()
    if page == "cut short":
        path.write_bytes(b"PK")
    else:
        path.symlink_to(path)  # which not even root can open, as it can any file of mode 0600
    with pytest.raises(UserError, match=r"name a copy of Inception's weights in fid\.inception") as error:
        check_feature_network("inception", "clean")
    assert str(path) in one_line(error)


def test_inception_is_kept_in_a_cache_of_the_user(tmp_path, monkeypatch):
    """Not in clean-fid's /tmp, where another user's file may be in the way."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url, path, _ = features._inception_file("clean")
    assert path == tmp_path / "hub" / "checkpoints" / "inception-2015-12-05.pt"
    assert url.startswith("https://") and url.endswith(path.name)
    url, path, digest = features._inception_file("legacy_pytorch")
    assert path == tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    assert url.endswith(path.name) and digest in path.name


def test_unknown_networks_are_refused(tmp_path):
    with pytest.raises(UserError, match="no_such_folder"):
        check_feature_network(str(tmp_path / "no_such_folder"))
    with pytest.raises(UserError, match="legacy_pytorch"):
        check_feature_network("inception", "tidy")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_inception_goes_through_cleanfid(tmp_path, monkeypatch, images, mode, capsys):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    path = tmp_path / "checkpoints/inception-2015-12-05.pt"
    path.parent.mkdir()
    save_inception(path)
    digest = sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(features._INCEPTION_DIGESTS, mode, digest)

    network = load_feature_network("inception", mode)
    assert (network.name, network.dimension, network.published) == ("inception", 2048, True)
    assert not capsys.readouterr().out
    found = network(images)
    script = torch.jit.load(path)
    if mode == "legacy_tensorflow":
        pixels = images.permute(0, 3, 1, 2).float()
        expected = script(pixels, return_features=True)
        probabilities = script(pixels, no_output_bias=True)
        assert relative_error(network.logits(found).softmax(1), probabilities) < 1e-5
    else:
        resized = F.interpolate(
            images.permute(0, 3, 1, 2).float(),
            (299, 299),
            mode="bicubic",
            antialias=True,
            align_corners=False,
        )
        expected = script.layers((resized.clamp(0, 255) - 128) / 128)
    assert found.shape == (5, 2048) and found.dtype == torch.float32
    assert relative_error(found, expected) < 1e-3


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_local_copy_of_inception_and_what_is_not_the_published_file(tmp_path, images, capsys):
    save_inception(tmp_path / "mine.pt")
    network = load_feature_network("inception", "clean", inception=str(tmp_path / "mine.pt"))
    assert network.published is False
    assert "compare with nobody's" in capsys.readouterr().out
    other = load_feature_network("inception", "legacy_tensorflow", inception=str(tmp_path / "mine.pt"))
    assert other.digest != network.digest
    with pytest.raises(UserError, match=r"fid\.inception = .*gone\.pt: there is no such file"):
        load_feature_network("inception", "clean", inception=str(tmp_path / "gone.pt"))
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(UserError, match=r"fid\.inception = .*folder\.pt: cannot be read \(Is a directory"):
        load_feature_network("inception", "clean", inception=str(tmp_path / "folder.pt"))
    old = io.BytesIO()  # the published file of pytorch-fid is of this format
    torch.save({"fc.weight": torch.zeros(3)}, old, _use_new_zipfile_serialization=False)
    for content in (b"no network", b"", old.getvalue()[:1], old.getvalue()[:100]):
        (tmp_path / "bad.pt").write_bytes(content)
        for mode in ("clean", "legacy_pytorch"):
            with pytest.raises(UserError, match=r"fid\.inception = .*bad\.pt: damaged, or not Inception"):
                load_feature_network("inception", mode, inception=str(tmp_path / "bad.pt"))


@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_the_pytorch_port_is_cleanfids(tmp_path, images, prefix):
    """Against the whole network with the same random weights, its last layer included."""
    whole = random_port()
    weights = {prefix + name: tensor for name, tensor in whole.state_dict().items()}
    torch.save(weights, tmp_path / "port.pth")
    network = load_feature_network("inception", "legacy_pytorch", inception=str(tmp_path / "port.pth"))
    with torch.no_grad():
        pixels = F.interpolate(
            images.permute(0, 3, 1, 2).float(), (299, 299), mode="bilinear", align_corners=False
        )
        logits = whole(2 * (pixels.clamp(0, 255) / 255) - 1)
    found = network(images)
    assert found.shape == (5, 2048)
    assert relative_error(network.logits(found) + whole.fc.bias, logits) < 1e-4


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
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
    network = load_feature_network(path)
    assert (network.dimension, network.classify, network.published) == (3, None, None)
    torch.testing.assert_close(network(images), images.float().mean((1, 2)))
    (tmp_path / "bad.ts").write_bytes(b"no network")
    with pytest.raises(UserError, match=r"bad\.ts: damaged or not TorchScript"):
        load_feature_network(str(tmp_path / "bad.ts"))
    with pytest.raises(UserError, match=r"gone\.pt: there is no such file"):
        check_feature_network(str(tmp_path / "gone.pt"))
    torch.jit.script(torch.nn.Identity()).save(path)
    with pytest.raises(UserError, match=r"gives \[1, 3, 299, 299\]"):
        load_feature_network(path)


@pytest.fixture
def classifier(tmp_path):
    torch.manual_seed(0)
    model = ImageClassifier(image_size=12, num_classes=4).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)  # features of order 1 without any training
    model.save_pretrained(tmp_path)
    return model


def relative_error(found, expected) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@torch.no_grad()
def test_classifier_sees_the_pixels(classifier, tmp_path, images):
    network = load_feature_network(str(tmp_path), workers=3)
    found = network(images)
    expected = classifier.features(images.permute(0, 3, 1, 2).float())
    assert found.shape == (5, network.dimension)
    assert relative_error(found, expected) < 1e-5
    assert network.labels
    assert torch.equal(network.logits(found), classifier.logits(found))


@torch.no_grad()
def test_classifier_sees_resized_pixels(classifier, tmp_path, images):
    large = images.repeat_interleave(3, 1).repeat_interleave(2, 2)  # [5, 36, 24, 3]
    found = load_feature_network(str(tmp_path))(large)
    pixels = F.interpolate(
        large.permute(0, 3, 1, 2).float(), (12, 12), mode="bicubic", antialias=True, align_corners=False
    )
    expected = classifier.features(pixels.clamp(0, 255))
    assert relative_error(found, expected) < 1e-3


def test_features_are_float32_under_mixed_precision(classifier, tmp_path, images):
    network = load_feature_network(str(tmp_path))
    with torch.no_grad():
        expected = classifier.features(images.permute(0, 3, 1, 2).float())
    with torch.autocast("cpu", torch.bfloat16):
        found = network(images)
    assert relative_error(found, expected) < 1e-5


def test_digest_tells_weights_apart(classifier, tmp_path):
    before = load_feature_network(str(tmp_path)).digest
    assert load_feature_network(str(tmp_path)).digest == before
    with torch.no_grad():
        next(classifier.parameters()).add_(1)
    classifier.save_pretrained(tmp_path)
    assert load_feature_network(str(tmp_path)).digest != before
