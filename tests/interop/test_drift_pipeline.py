"""DriftPipeline, and the folders that it reads and writes."""

import json
import shutil

import numpy as np
import pytest
import torch
from complaints import complaint
from safetensors.torch import save_file
from small_generator import SIZES, VAE_FOLDER, write_generator
from small_rae import small_rae

from drift.autoencoders import RAE, VAE
from drift.evaluation.pictures import draw_images
from drift.evaluation.sample import ImageDecoder
from drift.interop.card import Card, export_pipeline
from drift.interop.pipeline import DriftPipeline
from drift.models.generator import Generator


@pytest.mark.parametrize("rounding", ["nearest", "down"])
def test_pixels_are_those_of_the_fid_stage_and_do_not_depend_on_company(generator_folder, pipe, rounding):
    labels = np.arange(40) % 3
    decode = ImageDecoder(VAE.from_pretrained(VAE_FOLDER), 32, rounding)
    generator = Generator.from_pretrained(generator_folder)
    expected = draw_images(generator, decode, [(label, i, 1.5) for i, label in enumerate(labels)], 9, 64)
    for indices in (range(40), [5], [30, 2, 39]):
        generators = pipe.sample_generators(9, indices)
        images = pipe(labels[list(indices)], omega=1.5, generator=generators, rounding=rounding).images
        for index, image in zip(indices, images, strict=True):
            assert np.array_equal(np.asarray(image), expected[index])


def test_an_rae_decodes_and_is_exported_like_a_vae(tmp_path):
    rae, folder, indices = str(tmp_path / "rae"), tmp_path / "generator", range(3)
    small_rae(pixels=16).save_pretrained(rae)
    write_generator(folder, vae=rae, in_channels=64, input_size=2)
    wanted = [(label, i, 1.5) for i, label in enumerate((0, 2, 2))]
    decode, generator = ImageDecoder(RAE.from_pretrained(rae), 32), Generator.from_pretrained(folder)
    expected = draw_images(generator, decode, wanted, 9, 64)
    export_pipeline(folder, tmp_path / "out", Card("x"))
    assert json.loads((tmp_path / "out/model_index.json").read_text())["vae"] == [
        "diffusers",
        "AutoencoderRAE",
    ]
    assert "| RAE | rae |" in (tmp_path / "out/README.md").read_text()
    for source in (folder, tmp_path / "out"):
        pipe = DriftPipeline.from_pretrained(source)
        images = pipe([0, 2, 2], omega=1.5, generator=pipe.sample_generators(9, indices)).images
        assert all(
            np.array_equal(np.asarray(image), each) for image, each in zip(images, expected, strict=True)
        )
    shutil.rmtree(rae)
    message = complaint(lambda: DriftPipeline.from_pretrained(folder))
    assert message.startswith(f"VAE {rae}: {rae}: is not a local folder")


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
def test_half_precision_is_near_and_moves_back(generator_folder, dtype):
    pipe = DriftPipeline.from_pretrained(generator_folder)

    def run():
        return pipe([0, 1], generator=pipe.sample_generators(0, [0, 1]), output_type="np").images

    whole = run()
    assert pipe.to(dtype) is pipe and pipe.dtype == dtype and pipe.generator.dtype == dtype
    assert 0 < abs(run() - whole).max() < 0.1
    half = DriftPipeline.from_pretrained(generator_folder, torch_dtype=dtype)
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


def test_it_is_offloaded_in_the_order_that_it_declares(generator_folder, pipe, monkeypatch):
    """As in diffusers' DiTPipeline: inputs on the execution device, and all networks put away at the end."""
    offloaded = DriftPipeline.from_pretrained(generator_folder)

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


def test_images_that_are_not_finite_are_refused(generator_folder):
    pipe = DriftPipeline.from_pretrained(generator_folder)
    with torch.no_grad():
        next(pipe.vae.decoder.conv_out.parameters()).fill_(float("nan"))
    assert "not finite in torch.float32: pipe.vae.to(torch.float32)" in complaint(lambda: pipe(0))


def test_latents_need_no_vae(generator_folder, pipe):
    bare = DriftPipeline.from_pretrained(generator_folder, load_vae=False)
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
    assert len({path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}) == 1
    texts = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert not any("_name_or_path" in text for text in texts)  # of this machine
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


def test_variants_are_named_as_in_diffusers(generator_folder, pipe, tmp_path):
    half = DriftPipeline.from_pretrained(generator_folder, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", safe_serialization=True)
    names = [path.name for path in tmp_path.rglob("*.safetensors")]
    assert names == ["diffusion_pytorch_model.fp16.safetensors"] * 2
    options = {"variant": "fp16", "torch_dtype": torch.float16, "use_safetensors": True}
    again = DriftPipeline.from_pretrained(tmp_path, **options)
    assert again.dtype == torch.float16
    assert same(again.generator, half.generator) and same(again.vae, half.vae)
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


def test_a_vae_that_was_given_is_not_taken_for_the_one_it_replaces(generator_folder, pipe, tmp_path):
    other = DriftPipeline.from_pretrained(generator_folder, vae=pipe.vae)
    assert "must be saved" in complaint(lambda: other.save_pretrained(tmp_path / "p", include_vae=False))


def test_a_folder_without_settings_needs_a_vae(generator_folder, tmp_path):
    bare = shutil.copytree(generator_folder, tmp_path / "imported")
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
def test_damaged_files_of_a_stage_are_refused_by_name(generator_folder, tmp_path, name):
    copy = shutil.copytree(generator_folder, tmp_path / "g")
    (copy / name).write_text('["a", ')
    assert name in complaint(lambda: DriftPipeline.from_pretrained(copy))
