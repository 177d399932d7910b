import http.server
import socket
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from drift.errors import UserError
from drift.evaluation import features
from drift.evaluation.features import check_feature_network, fetch, load_feature_network
from drift.models.classifier import ClassifierConfig, ImageClassifier

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


def test_inception_is_looked_for_where_cleanfid_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    url, path, _ = features._inception_file("clean")
    assert path == Path("/tmp/inception-2015-12-05.pt")
    assert url.startswith("https://") and url.endswith(path.name)
    url, path, digest = features._inception_file("legacy_pytorch")
    assert path == tmp_path / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    assert url.endswith(path.name) and digest in path.name


def test_unknown_networks_are_refused(tmp_path):
    with pytest.raises(UserError, match="no_such_folder"):
        check_feature_network(str(tmp_path / "no_such_folder"))
    with pytest.raises(UserError, match="legacy_pytorch"):
        check_feature_network("inception", "tidy")


class Layers(torch.nn.Module):
    """In the place of Inception: the mean of each colour, over and over."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)).repeat(1, 683)[:, :2048]


class Inception(torch.nn.Module):
    """Takes 0..255 of any size, as the published TorchScript file does."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return self.layers((x - 128) / 128)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_inception_goes_through_cleanfid(tmp_path, monkeypatch, mode):
    # On Windows clean-fid looks in the working directory, so there a stand-in can be put
    monkeypatch.setattr(features.platform, "system", lambda: "Windows")
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Inception()).save("inception-2015-12-05.pt")
    digest = sha256(Path("inception-2015-12-05.pt").read_bytes()).hexdigest()
    monkeypatch.setitem(features._INCEPTION_DIGESTS, mode, digest)

    network = load_feature_network("inception", mode)
    colours = torch.tensor([[0, 128, 255], [64, 10, 200]], dtype=torch.uint8)
    found, predicted = network(colours[:, None, None].expand(2, 16, 16, 3))
    assert (network.name, network.dimension, predicted) == ("inception", 2048, None)
    assert found.shape == (2, 2048) and found.dtype == torch.float32
    torch.testing.assert_close(found[:, :3], (colours.float() - 128) / 128)


@pytest.fixture
def classifier(tmp_path):
    torch.manual_seed(0)
    model = ImageClassifier(ClassifierConfig(image_size=12, num_classes=4)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)  # features of order 1 without any training
    model.save_pretrained(tmp_path)
    return model


def relative_error(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def test_classifier_sees_the_pixels(classifier, tmp_path, images):
    network = load_feature_network(str(tmp_path), workers=3)
    found, predicted = network(images)
    expected = classifier.features(images.permute(0, 3, 1, 2).float())
    assert found.shape == (5, network.dimension)
    assert relative_error(found, expected) < 1e-5
    assert torch.equal(predicted, classifier.logits(expected).argmax(1))


@torch.no_grad()
def test_classifier_sees_resized_pixels(classifier, tmp_path, images):
    large = images.repeat_interleave(3, 1).repeat_interleave(2, 2)  # [5, 36, 24, 3]
    found, _ = load_feature_network(str(tmp_path))(large)
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
        found, _ = network(images)
    assert relative_error(found, expected) < 1e-5


def test_digest_tells_weights_apart(classifier, tmp_path):
    before = load_feature_network(str(tmp_path)).digest
    assert load_feature_network(str(tmp_path)).digest == before
    with torch.no_grad():
        next(classifier.parameters()).add_(1)
    classifier.save_pretrained(tmp_path)
    assert load_feature_network(str(tmp_path)).digest != before
