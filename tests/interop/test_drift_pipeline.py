"""DriftPipeline, the folders it reads and writes, and the commands sample and export."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from complaints import complaint
from imports import ROOT
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from drift import cli
from drift.autoencoders.kl import VAE
from drift.evaluation.pictures import VISIBLE_SIDE
from drift.evaluation.sample import ImageDecoder, Samples
from drift.interop.card import export_pipeline
from drift.interop.pipeline import DriftPipeline
from drift.models.generator import Generator
from drift.runtime.files import sha256

VAE_FOLDER = str(ROOT / "pretrained/digits_vae")
SIZES = {
    "in_channels": 4, "input_size": 4, "num_classes": 3, "hidden_size": 32, "depth": 2, "num_heads": 2,
    "patch_size": 2, "mlp_ratio": 2.0, "context_tokens": 2, "style_codebooks": 3, "style_entries": 8,
}  # fmt: skip
NAMES = ["tench, Tinca tinca", "cat", "7"]


def write_generator(folder, seed=0, names=NAMES, vae=VAE_FOLDER):
    """A folder as the drift stage writes it."""
    torch.manual_seed(seed)
    model = Generator(**SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the last layer starts at zero
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    (folder / "classes.json").write_text(json.dumps(names))
    settings = {"stage": "drift", "decides": {"vae": vae, "vae_revision": None, "drift": {"steps": 3}}}
    with (folder / "settings.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(settings | {"how": {"torch": "x"}}, file)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_generator(tmp_path_factory.mktemp("generator") / "generator")


@pytest.fixture(scope="module")
def pipe(folder):
    return DriftPipeline.from_pretrained(folder)


@pytest.mark.parametrize("rounding", ["nearest", "down"])
def test_pixels_are_those_of_the_fid_stage_and_do_not_depend_on_company(folder, pipe, rounding):
    labels = np.arange(40) % 3
    decode = ImageDecoder(VAE.from_pretrained(VAE_FOLDER), 32, rounding)
    generator = Generator.from_pretrained(folder)
    expected = torch.cat([i for _, i in Samples(labels, 9, 64).images(generator, decode, range(40), 1.5)])
    for indices in (range(40), [5], [30, 2, 39]):
        generators = pipe.sample_generators(9, indices)
        images = pipe(labels[list(indices)], omega=1.5, generator=generators, rounding=rounding).images
        for index, image in zip(indices, images, strict=True):
            assert np.array_equal(np.asarray(image), expected[index])


@pytest.mark.slow
def test_the_same_pixels_in_a_fresh_process_after_export(folder, pipe, tmp_path):
    """With nothing of the original in reach."""
    export_pipeline(folder, tmp_path / "exported", name="x")
    program = (
        "import sys, numpy as np; from drift.interop import DriftPipeline\n"
        "pipe = DriftPipeline.from_pretrained(sys.argv[1])\n"
        "np.save('images.npy', pipe([2, 0], omega=2, generator=pipe.sample_generators(4, [1, 8]), "
        "output_type='np').images)"
    )
    command, environment = [sys.executable, "-c", program, "exported"], os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=environment)
    expected = pipe([2, 0], omega=2, generator=pipe.sample_generators(4, [1, 8]), output_type="np").images
    assert np.array_equal(np.load(tmp_path / "images.npy"), expected)


def test_output_types_hold_the_same_values(pipe):
    def run(kind):
        return pipe([0, 1, 2], generator=pipe.sample_generators(0, range(3)), output_type=kind).images

    pil, array, tensor, latent = (run(kind) for kind in ("pil", "np", "pt", "latent"))
    assert all(image.size == (16, 16) and image.mode == "RGB" for image in pil)
    levels = np.stack([np.asarray(image) for image in pil])
    assert array.dtype == np.float32 and np.array_equal((array * 255).round(), levels)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert latent.shape == (3, 4, 4, 4) and latent.dtype == torch.float32
    assert pipe([0], return_dict=False, output_type="latent")[0].shape == (1, 4, 4, 4)


def test_noise_can_be_given_and_omega_be_one_for_each(pipe):
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    style = torch.zeros(2, 3, dtype=torch.long)
    mixed = pipe([1, 1], [1.0, 3.0], noise=noise, style_indices=style, output_type="latent").images
    for i, omega in enumerate((1.0, 3.0)):
        alone = pipe(1, omega, noise=noise[i : i + 1], style_indices=style[:1], output_type="latent").images
        assert torch.equal(alone[0], mixed[i])
    assert not torch.equal(mixed[0], mixed[1])
    # The network itself, which knows nothing of pipelines
    direct = pipe.generator(noise, torch.tensor([1, 1]), torch.tensor([1.0, 3.0]), style)
    torch.testing.assert_close(mixed, direct)


def test_one_generator_for_all_repeats(pipe):
    first, second = (
        pipe([0, 0], generator=torch.Generator().manual_seed(3), output_type="latent").images for _ in "ab"
    )
    assert torch.equal(first, second) and not torch.equal(first[0], first[1])
    torch.manual_seed(5)
    assert not torch.equal(pipe([0], output_type="latent").images[0], first[0])


@pytest.mark.parametrize(
    "labels",
    [np.array([2, 0]), np.array([2, 0], np.uint8), [np.int64(2), np.int32(0)], torch.tensor([2, 0]),
     np.array(["7", "tench"]), (2, np.int64(0)), ["7", "Tinca tinca"]],
)  # fmt: skip
def test_labels_are_numbers_of_any_kind_or_names(pipe, labels):
    def latents(labels, count=2):
        generators = pipe.sample_generators(0, np.arange(count))
        return pipe(labels, generator=generators, output_type="latent").images

    assert torch.equal(latents(labels), latents([2, 0]))
    assert torch.equal(latents(labels[0], 1), latents([2], 1))
    assert pipe.labels == {"7": 2, "Tinca tinca": 0, "cat": 1, "tench": 0, "tench, Tinca tinca": 0}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"class_labels": [3]}, "class 3: the classes are 0 to 2"),
        ({"class_labels": [-1]}, "class -1"),
        ({"class_labels": np.array([0.5])}, "class 0.5: is neither a number nor a name"),
        ({"class_labels": ["tinca"]}, "'tinca': no class has this name; try Tinca tinca"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": [0], "output_type": "jpeg"}, "'jpeg'"),
        ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 generators for 2 class labels"),
        ({"class_labels": [0], "noise": torch.zeros(1, 4, 8, 8)}, "noise [1, 4, 8, 8]"),
    ],
)
def test_what_cannot_be_is_refused(pipe, arguments, named):
    assert named in complaint(lambda: pipe(**arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_moves_back(folder, dtype):
    pipe = DriftPipeline.from_pretrained(folder)

    def run():
        return pipe([0, 1], generator=pipe.sample_generators(0, [0, 1]), output_type="np").images

    whole = run()
    assert pipe.to(dtype) is pipe and pipe.dtype == dtype and pipe.generator.dtype == dtype
    assert 0 < abs(run() - whole).max() < 0.1
    half = DriftPipeline.from_pretrained(folder, torch_dtype=dtype)
    assert half.vae.dtype == half.generator.dtype == dtype
    assert set(pipe.components) == {"generator", "vae"}


class Offload:
    """What accelerate's `cpu_offload_with_hook` puts on a network, with other devices.

    The network is on `meta` until it is called, a VAE's `decode` included (diffusers' `apply_forward_hook`
    sees to that), and then on the CPU, until the next network is called or it is put away. So whatever asks a
    network that is away for its device gets the wrong answer, as with a GPU.
    """

    execution_device = torch.device("cpu")

    def __init__(self, module, before=None):
        self.module, self.before = module, before
        self.weights, self.calls = dict(module.state_dict()), 0
        module._hf_hook = self
        for name in {"forward", "decode"} & set(dir(module)):
            setattr(module, name, self.hooked(getattr(module, name)))
        self.offload()

    def hooked(self, method):
        def call(*args, **kwargs):
            self.pre_forward()
            return method(*args, **kwargs)

        return call

    def pre_forward(self):
        if self.before is not None:
            self.before.offload()
        self.calls += 1
        for name, weight in self.weights.items():
            owner, _, last = name.rpartition(".")
            part = self.module.get_submodule(owner)
            setattr(part, last, torch.nn.Parameter(weight, requires_grad=False))

    def offload(self):
        self.module.to("meta")


def test_it_is_offloaded_in_the_order_that_it_declares(folder, pipe, monkeypatch):
    """As in diffusers' DiTPipeline: inputs on the execution device, and all networks put away at the end."""
    offloaded = DriftPipeline.from_pretrained(folder)

    def enable_model_cpu_offload(self, device="cuda"):
        hook, self._all_hooks = None, []
        for name in self.model_cpu_offload_seq.split("->"):
            hook = Offload(self.components[name], hook)
            self._all_hooks.append(hook)

    enable_model_cpu_offload(offloaded)
    freed = []
    monkeypatch.setattr(
        DriftPipeline,
        "enable_model_cpu_offload",
        lambda self, device: (
            freed.append([hook.calls for hook in self._all_hooks])
            or [hook.offload() for hook in self._all_hooks]
        ),
    )
    for _ in "ab":
        found = offloaded([0, 2], generator=pipe.sample_generators(0, [0, 1]), output_type="np").images
        expected = pipe([0, 2], generator=pipe.sample_generators(0, [0, 1]), output_type="np").images
        assert np.array_equal(found, expected)
        assert {offloaded.generator.device.type, offloaded.vae.device.type} == {"meta"}
    assert freed == [[1, 1], [2, 2]]


def test_networks_can_be_moved_while_it_runs(pipe):
    """Hooks move them in the middle, and they must be as usable afterwards as before."""
    modes = []
    handle = pipe.generator.register_forward_pre_hook(
        lambda *_: modes.append(torch.is_inference_mode_enabled())
    )
    pipe(0, output_type="latent")
    handle.remove()
    assert modes and not any(modes)


def test_images_that_are_not_finite_are_refused(folder):
    pipe = DriftPipeline.from_pretrained(folder)
    with torch.no_grad():
        next(pipe.vae.decoder.conv_out.parameters()).fill_(float("nan"))
    assert "not finite in torch.float32: pipe.vae.to(torch.float32)" in complaint(lambda: pipe(0))


def test_latents_need_no_vae(folder, pipe):
    bare = DriftPipeline.from_pretrained(folder, load_vae=False)
    found, expected = (
        p([1], generator=pipe.sample_generators(0, [3]), output_type="latent").images for p in (bare, pipe)
    )
    assert bare.vae is None and torch.equal(found, expected)
    assert "no VAE" in complaint(lambda: bare([0]))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("include_vae", [True, False])
def test_saved_and_loaded(pipe, tmp_path, include_vae):
    pipe.save_pretrained(tmp_path, include_vae=include_vae)
    assert {path.name for path in tmp_path.iterdir()} - {"vae"} == {"model_index.json", "generator"}
    assert (tmp_path / "vae").exists() == include_vae
    assert not any(
        "_name_or_path" in path.read_text() for path in tmp_path.rglob("*.json")
    )  # of this machine
    again = DriftPipeline.from_pretrained(tmp_path)
    assert again.id2label == pipe.id2label and again.vae_reference == {"id": VAE_FOLDER, "revision": None}
    assert same(again.vae, pipe.vae) and same(again.generator, pipe.generator)


def test_exports_of_the_first_version_are_read(pipe, tmp_path):
    pipe.vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "generator").mkdir()
    save_file(pipe.generator.state_dict(), tmp_path / "generator/model.safetensors")
    (tmp_path / "generator/config.json").write_text(json.dumps({"model": "Generator", **SIZES}))
    index = {
        "_class_name": "DriftPipeline", "generator": ["drift.models", "Generator"],
        "vae": ["diffusers", "AutoencoderKL"], "vae_reference": None, "id2label": {"2": "c"},
    }  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    former = DriftPipeline.from_pretrained(tmp_path)
    assert same(former.vae, pipe.vae) and same(former.generator, pipe.generator) and former.labels["c"] == 2


def test_variants_are_named_as_in_diffusers(folder, pipe, tmp_path):
    half = DriftPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", safe_serialization=True)
    names = [path.name for path in tmp_path.rglob("*.safetensors")]
    assert names == ["diffusion_pytorch_model.fp16.safetensors"] * 2
    options = {"variant": "fp16", "torch_dtype": torch.float16, "use_safetensors": True}
    again = DriftPipeline.from_pretrained(tmp_path, **options)
    assert (
        again.dtype == torch.float16 and same(again.generator, half.generator) and same(again.vae, half.vae)
    )
    # An EMA copy has no VAE of its own
    pipe.vae.save_pretrained(tmp_path / "vae")
    half.generator.float().save_pretrained(tmp_path / "generator", variant="ema_0999")
    for variant in ("ema_0999", "ema_0.999"):
        copy = DriftPipeline.from_pretrained(tmp_path, variant=variant)
        assert same(copy.generator, half.generator) and same(copy.vae, pipe.vae)
    assert "model.bf16.safetensors: is missing" in complaint(
        lambda: DriftPipeline.from_pretrained(tmp_path, variant="bf16")
    )
    assert "safetensors only" in complaint(
        lambda: DriftPipeline.from_pretrained(tmp_path, use_safetensors=False)
    )
    with pytest.raises(TypeError, match="takes no weights"):
        DriftPipeline.from_pretrained(tmp_path, weights="ema_0.999")


def test_options_of_the_hub_are_handed_on(pipe, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns, **options):
        asked.append((repository, revision, options))
        pipe.save_pretrained(tmp_path / "p", include_vae=False)
        return tmp_path / "p" if repository == "someone/generator" else VAE_FOLDER

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    options = {"local_files_only": True, "cache_dir": "x"}
    DriftPipeline.from_pretrained("someone/generator", vae="someone/vae", revision="r", **options)
    assert asked == [("someone/generator", "r", options), ("someone/vae", None, options)]


def test_a_vae_that_was_given_is_not_taken_for_the_one_it_replaces(folder, pipe, tmp_path):
    other = DriftPipeline.from_pretrained(folder, vae=pipe.vae)
    assert "must be saved" in complaint(lambda: other.save_pretrained(tmp_path / "p", include_vae=False))


def test_a_folder_without_settings_needs_a_vae(folder, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "imported")
    (bare / "settings.yaml").unlink()
    assert "VAE" in complaint(lambda: DriftPipeline.from_pretrained(bare))
    assert DriftPipeline.from_pretrained(bare, vae=VAE_FOLDER)([1]).images[0].size == (16, 16)


@pytest.mark.parametrize(
    "name",
    ["model_index.json", "generator/config.json", "generator/diffusion_pytorch_model.safetensors",
     "vae/config.json", "vae/diffusion_pytorch_model.safetensors"],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(pipe, tmp_path, name):
    pipe.save_pretrained(tmp_path / "p")
    file = tmp_path / "p" / name
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"[]", b"{}"):
        file.write_bytes(content)
        told = complaint(lambda: DriftPipeline.from_pretrained(tmp_path / "p"))
        assert file.name in told or str(file.parent) in told
    file.unlink()
    assert file.name in complaint(lambda: DriftPipeline.from_pretrained(tmp_path / "p"))


@pytest.mark.parametrize("name", ["classes.json", "settings.yaml"])
def test_damaged_files_of_a_stage_are_refused_by_name(folder, tmp_path, name):
    copy = shutil.copytree(folder, tmp_path / "g")
    (copy / name).write_text('["a", ')
    assert name in complaint(lambda: DriftPipeline.from_pretrained(copy))


def metrics_of(folder, file):
    entry = {"omega": 2.0, "ema_decay": None, "fid": 3.14159, "inception_score": 9.5}
    protocol = {"features": "inception", "reference_images": 50, "floor_images": 9, "mode": "clean"}
    digests = [sha256(folder / name) for name in ("config.json", "diffusion_pytorch_model.safetensors")]
    result = {
        "best": entry, "sweep": [entry], "floor": 1.0, "training": None, "images": 100,
        "classifier_accuracy_real": None, "protocol": protocol | {"generator_sha256": digests},
    }  # fmt: skip
    file.write_text(json.dumps(result))
    return file


def test_the_model_card_tells_what_was_measured(folder, tmp_path):
    metrics = metrics_of(folder, tmp_path / "fid.json")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    options = {"metrics": metrics, "picture": tmp_path / "picture.png", "license": "mit", "dataset": "a/b"}
    files = dict(export_pipeline(folder, tmp_path / "out", name="fish", **options))
    card = (tmp_path / "out/README.md").read_text()
    assert files.keys() >= {"README.md", "samples.png", "model_index.json", "settings.yaml"}
    _, front, body = card.split("---\n", 2)
    head = YAML(typ="safe", pure=True).load(front)
    assert (head["license"], head["datasets"], head["library_name"]) == ("mit", ["a/b"], "drift")
    assert head["model-index"][0]["results"][0]["metrics"][0] == {
        "type": "fid",
        "name": "FID",
        "value": 3.1416,
    }
    for told in (
        "# fish",
        "| 2 (best) | 3.14 | 9.50 |",
        "| drift.steps | 3 |",
        "| mode | clean |",
        "omega=2,",
    ):
        assert told in body
    # The program on the card runs
    program = (
        body.split("```python\n")[1].split("```")[0].replace('"cuda"', '"cpu"').replace('"fish"', '"out"')
    )
    subprocess.run(
        [sys.executable, "-c", program + "assert image.size == (16, 16)"],
        cwd=tmp_path,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )


def test_metrics_of_another_generator_do_not_get_into_a_card(folder, tmp_path):
    other = write_generator(tmp_path / "other", seed=1)
    metrics = metrics_of(other, tmp_path / "fid.json")
    told = complaint(lambda: export_pipeline(folder, tmp_path / "out", name="x", metrics=metrics))
    assert str(metrics) in told and "another generator" in told
    own = metrics_of(folder, tmp_path / "own.json")
    export_pipeline(folder, tmp_path / "pipeline", name="x")
    for source in (tmp_path / "pipeline", "someone/generator"):  # of a pipeline; on the hub
        told = complaint(lambda: export_pipeline(source, tmp_path / "out", name="x", metrics=metrics))  # noqa: B023
        assert str(metrics) in told and "--no-metrics" in told
    export_pipeline(tmp_path / "pipeline", tmp_path / "again", name="x", metrics=own)
    assert "3.14" in (tmp_path / "again/README.md").read_text()
    metrics.write_text("{}")
    assert str(metrics) in complaint(
        lambda: export_pipeline(folder, tmp_path / "out", name="x", metrics=metrics)
    )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_export_replaces_nothing_unasked_and_names_no_private_vae(folder, tmp_path):
    (tmp_path / "out").mkdir()
    assert "--force" in complaint(lambda: export_pipeline(folder, tmp_path / "out", name="x"))
    assert "local folder" in complaint(
        lambda: export_pipeline(folder, tmp_path / "new", name="x", include_vae=False)
    )
    export_pipeline(folder, tmp_path / "out", name="x", force=True)
    assert "None are given" in (tmp_path / "out/README.md").read_text()


def test_sample_makes_the_grid(folder, pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["sample", str(folder), "--classes", "cat", "0", "7", "--count", "3", "--omega", "2"]
    assert cli.main([*arguments, "--seed", "5", "--device", "cpu", "--out", "a/grid.png"]) == 0
    out = capsys.readouterr().out
    assert "cat (1), tench (0), 7 (2)" in out and "wrote a/grid.png" in out
    grid = np.asarray(Image.open("a/grid.png"))
    side = VISIBLE_SIDE // 16 * 16
    expected = pipe([1] * 3, 2.0, pipe.sample_generators(5, range(3))).images
    right = grid[2 : 2 + side, -(side + 2) : -2]  # the last sample of the first row
    assert np.array_equal(right[::4, ::4], np.asarray(expected[2]))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_sample_tells_of_a_class_whose_name_the_terminal_cannot_show(tmp_path, encoding):
    """`\\udcff` is how Python reads the byte 0xff in the name of a folder."""
    source = write_generator(tmp_path / "generator", names=["a\udcff", "\u732b", "7"])
    done = subprocess.run(
        [sys.executable, "-m", "drift.cli", "sample", str(source), "--count", "1", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"a\\udcff (0), " in done.stdout and b"wrote outputs/samples.png" in done.stdout
    assert Image.open(tmp_path / "outputs/samples.png").height > 3 * VISIBLE_SIDE - 64


def test_sample_writes_files(folder, pipe, tmp_path):
    assert cli.main(["sample", str(folder), "--classes", "1", "--count", "2", "--files", "--device", "cpu",
                     "--out", str(tmp_path / "png")]) == 0  # fmt: skip
    expected = pipe([1] * 2, 1.0, pipe.sample_generators(0, range(2))).images
    files = sorted((tmp_path / "png").rglob("*.png"))
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        "png/1/000000.png", "png/1/000001.png"
    ]  # fmt: skip
    for file, image in zip(files, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(image))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere"),
        (["--classes", "dog"], "'dog'"),
        (["--classes", "3"], "the classes are 0 to 2"),
        (["--count", "0"], "--count 0"),
        (["--omega", "0"], "--omega 0"),
        (["--omega", "nan"], "--omega nan"),
        (["--out", "grid.jpg"], "grid.jpg"),
        (["--weights", "ema_05"], "ema_05"),
        (["--device", "abacus"], "abacus"),
        (["--vae", "no-vae"], "no-vae"),
    ],
)
def test_sample_refuses_in_one_line(folder, tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = [] if arguments[0] == "nowhere" else [str(folder)]
    assert cli.main(["sample", *source, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and told in error
    assert not list(tmp_path.rglob("*.png"))


def test_samples_of_a_revision(tmp_path, monkeypatch, capsys):
    """The generator that was committed, not the one that lies there now."""
    monkeypatch.chdir(tmp_path)
    binaries = os.path.dirname(sys.executable)
    monkeypatch.setenv("PATH", os.pathsep.join([binaries, os.environ["PATH"]]))
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "drift")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "drift@example.org")

    def run(*command):
        subprocess.run(command, check=True, capture_output=True)

    run("git", "init", "--quiet")
    run("dvc", "init", "--quiet")
    write_generator(tmp_path / "artifacts/generator", seed=0)
    run("dvc", "add", "--quiet", "artifacts/generator")
    run("git", "add", "--all")
    run("git", "commit", "--quiet", "--message", "one")
    run("git", "tag", "one")
    first = load_file("artifacts/generator/diffusion_pytorch_model.safetensors")
    shutil.rmtree("artifacts/generator")
    write_generator(tmp_path / "artifacts/generator", seed=1)
    run("dvc", "add", "--quiet", "artifacts/generator")
    run("git", "commit", "--quiet", "--all", "--message", "two")

    common = ["sample", "--classes", "0", "--count", "2", "--device", "cpu"]
    assert cli.main([*common, "--out", "now.png"]) == 0
    for _ in "ab":  # the second time from the work folder
        assert cli.main([*common, "--rev", "one", "--out", "before.png"]) == 0
    now, before = (np.asarray(Image.open(f"{name}.png")) for name in ("now", "before"))
    assert not np.array_equal(now, before)
    [kept] = (tmp_path / ".work/revisions").glob("*/artifacts/generator")
    assert all(
        torch.equal(load_file(kept / "diffusion_pytorch_model.safetensors")[name], first[name])
        for name in first
    )
    absolute = str(tmp_path / "artifacts/generator")
    assert cli.main([*common, absolute, "--rev", "one", "--out", "absolute.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("absolute.png")), before)
    capsys.readouterr()
    for outside in ("../generator", str(tmp_path.parent), "."):
        assert cli.main([*common, outside, "--rev", "one", "--out", "x.png"]) == 2
        assert f"{outside} as of one: is not below {tmp_path}" in capsys.readouterr().err
    assert cli.main([*common, "--rev", "three", "--out", "x.png"]) == 2
    assert "three" in capsys.readouterr().err
    assert cli.main([*common, "other", "--rev", "one", "--out", "x.png"]) == 2
    assert "other as of one" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["sample"], ["export", "out"]])
def test_the_hub_is_not_asked_for_a_generator_that_is_not_trained_yet(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("drift.interop.pipeline.download", lambda *_, **__: pytest.fail("asked the hub"))
    assert cli.main([*command, *(["--no-metrics"] if command[0] == "export" else [])]) == 2
    told = capsys.readouterr().err
    assert told.startswith(
        "error: artifacts/generator: there is none; dvc repro trains it, dvc pull fetches it"
    )
    assert not list(tmp_path.glob("out*/*"))
