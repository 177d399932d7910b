"""The Triton kernel against the reference: in Triton's interpreter, and on a GPU where there is one.

An environment variable chooses the interpreter before triton is imported: it has a process of its own.
"""

import importlib.util
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from complaints import complaint
from field_inputs import draw, loss_and_grad, relative_error
from ruamel.yaml import YAML
from test_golden import RELEASE as RELEASE_FILES
from test_golden import release_case
from test_parts import in_parts

import drift.field.loss
from drift.errors import UserError
from drift.field import FieldSettings, drifting_loss
from drift.field.loss import takes_triton
from drift.field.settings import TRITON_SHARED_BYTES, TRITON_VECTORS, beyond_triton
from drift.params import load_settings
from drift.training.objective import Samples, drift_objective, step_sums

RELEASE = FieldSettings()
PRIOR = FieldSettings.prior()
SMALL = {"generated": 2, "positives": 1, "unconditional": 0}
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]

has_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (it is made for Linux)"
)


def interpret() -> None:
    """Makes this process one of Triton's interpreter."""
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def by_triton(inputs, settings, device):
    """Loss, gradient and statistics."""
    loss, grad, statistics = loss_and_grad(*(t.to(device) for t in inputs), settings, impl="triton")
    return loss.cpu(), grad.cpu(), {name: value.cpu() for name, value in statistics.items()}


def in_parts_by_triton(inputs, sizes, settings, device):
    loss, grad, statistics = in_parts([t.to(device) for t in inputs], sizes, settings, impl="triton")
    return loss.cpu(), grad.cpu(), {name: value.cpu() for name, value in statistics.items()}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cpu", id="interpreter"),
        pytest.param(
            "cuda",
            id="gpu",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
        ),
    ],
)
def triton(request):
    """Calls a function of this module with a device, where Triton can be had."""
    if request.param == "cuda":
        yield lambda function, *args: function(*args, "cuda")
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=interpret) as pool:
        yield lambda function, *args: pool.submit(function, *args, "cpu").result()


def assert_same(result, expected, tolerance=1e-4):
    """Of losses, gradients and statistics."""
    assert relative_error(result[0], expected[0]) < tolerance
    assert relative_error(result[1], expected[1]) < tolerance
    assert result[1].dtype == expected[1].dtype and result[1].shape == expected[1].shape
    assert result[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        torch.testing.assert_close(result[2][name], value, rtol=tolerance, atol=1e-9, msg=name)


CASES = {
    "release": (RELEASE, {}),
    "odd": (RELEASE, {"classes": 2, "n": 17, "p": 19, "u": 3, "channels": 40}),
    "tiles": (RELEASE, {"classes": 2, "locations": 1, "n": 16, "p": 32, "u": 16, "channels": 64}),
    "one-channel": (RELEASE, {"channels": 1}),
    "without-unconditional": (RELEASE, {"u": 0}),
    "one-temperature": (replace(RELEASE, temps=(0.05,)), {}),
    "with-itself": (replace(RELEASE, mask_self_neg=False), {}),
    "without-floor": (replace(RELEASE, affinity_floor=0.0), {}),
    "not-in-scale": (replace(RELEASE, self_in_scale=False), {}),
    "raw": (replace(RELEASE, normalize_drift_theta=False, drift_tau_scale=True), {}),
    "row": (replace(RELEASE, coupling="row"), {"channels": 33}),
    "vanilla": (replace(RELEASE, vanilla=True), {}),
    "prior": (PRIOR, {}),
    "prior-squares": (replace(PRIOR, dist_metric="l2_sq", mask_self_neg=False), {}),
}


@has_triton
@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_the_reference(triton, name):
    settings, sizes = CASES[name]
    inputs = draw(**sizes)  # omega 1, 1.5, ...
    assert_same(triton(by_triton, inputs, settings), loss_and_grad(*inputs, settings))


@has_triton
def test_numbers_at_the_largest_size(triton):
    sizes = {key[0]: count for key, count in TRITON_VECTORS.items()}  # generated, positives, unconditional
    inputs = draw(classes=1, n=sizes["g"], p=sizes["p"], u=sizes["u"], locations=2, channels=50)
    inputs[3][:] = 2.5
    assert_same(triton(by_triton, inputs, RELEASE), loss_and_grad(*inputs, RELEASE))


@has_triton
@pytest.mark.parametrize("path", RELEASE_FILES, ids=lambda path: path.stem.removeprefix("release_loss_"))
def test_release_numbers(triton, path):
    inputs, settings, golden = release_case(path)
    loss, grad, statistics = triton(by_triton, [*inputs, inputs[0]], settings)
    assert relative_error(loss, golden["loss"]) < 1e-4
    assert relative_error(grad[:, :, 0], golden["grad"]) < 1e-4
    root_channels = inputs[0].shape[-1] ** 0.5
    assert relative_error(statistics["scale"] * root_channels, golden["scale"]) < 1e-4
    for tau, rms in zip(settings.temps, statistics["drift_rms"], strict=True):
        assert relative_error(rms.square(), golden[f"force_ms_{tau}"]) < 1e-4


@has_triton
@pytest.mark.parametrize(
    ("temps", "factor", "shift"),
    [((1e-6, 0.02), 1.0, 0.0), ((1e-3, 1e3), 1.0, 1e3), ((0.02,), 1e-12, 0.0), ((0.02, 0.2), 1e8, 10.0)],
    ids=["tiny-tau", "far-apart", "tiny", "huge"],
)
@pytest.mark.parametrize("floor", [0.0, 1e-6])
def test_extreme_values_are_as_finite_as_in_the_reference(triton, temps, factor, shift, floor):
    x, pos, uncond, omega, second = draw(channels=8)
    inputs = [(x + shift) * factor, pos * factor, uncond * factor, omega, second]
    settings = replace(RELEASE, temps=temps, affinity_floor=floor)
    expected = loss_and_grad(*inputs, settings)
    assert expected[1].isfinite().all()
    assert_same(triton(by_triton, inputs, settings), expected)


@has_triton
def test_equal_vectors(triton):
    """A constant feature: only rounding is left of the drift, but it stays a number."""
    x, pos, uncond, omega, second = (torch.ones_like(t) for t in draw())
    loss, grad, statistics = triton(by_triton, [x, pos, uncond, omega, second], RELEASE)
    assert all(value.isfinite().all() for value in (loss, grad, *statistics.values()))


@has_triton
def test_any_strides_and_types(triton):
    x, pos, uncond, omega, second = draw()
    inputs = [t.transpose(2, 3).contiguous().transpose(2, 3).bfloat16() for t in (x, pos, uncond)]
    inputs[1] = inputs[1].repeat_interleave(2, dim=1)[:, ::2]
    inputs += [omega, second]
    expected = loss_and_grad(*inputs, RELEASE)
    result = triton(by_triton, inputs, RELEASE)
    assert result[1].dtype == torch.bfloat16
    assert relative_error(result[1], expected[1]) < 2**-7  # a half precise number may be its neighbour
    assert relative_error(result[0], expected[0]) < 1e-4


@has_triton
def test_parts_equal_the_whole(triton):
    inputs = draw(classes=5)
    in_part = triton(in_parts_by_triton, inputs, [2, 3], RELEASE)
    assert_same(in_part, loss_and_grad(*inputs, RELEASE))


BUILD = """
import sys

import drift.field.triton_kernel as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

capability, pointer, stride, ones = int(sys.argv[1]), *sys.argv[2:4], sys.argv[4:]
strides = (stride, stride, stride, "constexpr")
types = {name: (pointer, strides, "i32") for name in ("x", "uncond", "pos")}
types |= dict.fromkeys(("L", "C", "T"), "i32") | dict.fromkeys(("squared_floor", "floor"), "fp32")
types |= dict.fromkeys(ones, "constexpr") | {"drift": pointer, "drift_strides": strides}
constants = dict(SQUARES=False, BN=64, BU=32, BP=64, BC=kernels.CHANNELS)
constants |= dict(TWO_SIDED=True, MASK_SELF=True, WITH_SELF=True)
for kernel in (kernels._distance_sums, kernels._fields, kernels._drift):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
    known = {(names.index(n),): value for n, value in constants.items() if n in names}
    known |= {(names.index(n), 1, 3): 1 for n in ("x", "uncond", "pos")}
    known |= {(names.index(n),): 1 for n in ones if n in names}
    if "drift_strides" in names:
        known[names.index("drift_strides"), 3] = 1
    built = compile(
        ASTSource(kernel, signature, known),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 16},
    )
    print(built.metadata.shared)
"""


@has_triton
@pytest.mark.parametrize(
    "variant",
    [("80", "*fp32", "i32"), ("90", "*bf16", "i64", "L", "T")],  # where a count is 1, it is a constant
    ids=["A100", "H100"],
)
def test_kernels_build_and_fit_for_a_gpu(tmp_path, variant):
    """The compiler needs no GPU, and refuses what the interpreter lets pass."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *variant],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared = [int(line) for line in done.stdout.split()]
    assert len(shared) == 3
    assert max(shared) <= TRITON_SHARED_BYTES <= 163 * 1024  # of an A100


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"coupling": "sinkhorn"}, "coupling sinkhorn: allowed: partial_two_sided or row"),
        ({"drift_form": "split"}, "drift_form split: allowed: alg2_joint"),
        ({"alg2_impl": "kernel"}, "alg2_impl kernel: allowed: logspace"),
        ({"negatives": "second_batch"}, "negatives second_batch: allowed: self"),
        ({"drift_unit_vec": True}, "drift_unit_vec true: allowed: false"),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_do_is_refused_by_triton_and_left_to_the_reference(
    changes, wanted, monkeypatch
):
    settings = replace(RELEASE, **changes)
    inputs = draw()
    with pytest.raises(UserError) as caught:
        loss_and_grad(*inputs, settings, impl="triton")
    message = str(caught.value)
    assert wanted in message and "field_impl = triton" in message and "\n" not in message
    expected = loss_and_grad(*inputs, settings)
    monkeypatch.setattr(drift.field.loss, "AUTO_IS_TRITON", True)
    torch.testing.assert_close(loss_and_grad(*inputs, settings, impl="auto"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("key", TRITON_VECTORS)
def test_too_many_vectors_are_refused(key):
    largest = TRITON_VECTORS
    assert beyond_triton(RELEASE, **largest) is None
    line = beyond_triton(RELEASE, **{**largest, key: largest[key] + 1})
    assert f"{largest[key] + 1} {key}" in line and f"at most {largest[key]}" in line


@pytest.mark.parametrize(
    ("preset", "changes", "wanted"),
    [
        ("prior_sinkhorn", {}, "does not do coupling sinkhorn"),
        ("imagenet256_ablation", {"positives": 65}, "does not do 65 positives"),
        ("imagenet256_ablation", {"unconditional": 33}, "does not do 33 unconditional"),
        *(
            (name, {}, None)
            for name in ("digits", "imagenet256_ablation", "imagenet256_l2", "prior_baseline")
        ),
    ],
)
def test_settings_that_the_kernel_does_not_do_are_refused_as_they_are_read(tmp_path, preset, changes, wanted):
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load(ROOT / "presets" / f"{preset}.yaml")
    assert content["hardware"]["field_impl"] == "auto"
    content["hardware"]["field_impl"] = "triton"
    content["drift"] |= changes
    file = tmp_path / "params.yaml"
    yaml.dump(content, file)
    if wanted is None:
        assert load_settings(file).hardware.field_impl == "triton"
    else:
        message = complaint(lambda: load_settings(file))
        assert "hardware.field_impl = triton" in message and wanted in message


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_objective_hands_it_on(impl):
    class Encoder:
        def encode(self, latents, drop_duplicates=False):
            return {}

    *latents, omega, _ = (t.unsqueeze(-1) for t in draw())
    samples = Samples(*latents, omega[:, 0])
    # Not for the kernel, whether or not there is one
    settings = replace(RELEASE, drift_unit_vec=True)
    for compute in (
        lambda: drift_objective(*samples[:4], Encoder(), settings, field_impl=impl),
        lambda: step_sums([samples], Encoder(), settings, field_impl=impl),
    ):
        if impl == "reference":
            compute()
        else:
            assert "drift_unit_vec" in complaint(compute)


def test_auto_is_the_reference_for_now(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # nobody asks for it
    assert not takes_triton("auto", RELEASE, torch.device("cuda"), **SMALL)
    inputs = draw()
    expected = loss_and_grad(*inputs, RELEASE)
    torch.testing.assert_close(loss_and_grad(*inputs, RELEASE, impl="auto"), expected, rtol=0, atol=0)


def test_without_triton_it_is_refused_and_auto_does_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="triton cannot be imported"):
        takes_triton("triton", RELEASE, torch.device("cuda"), **SMALL)
    monkeypatch.setattr(drift.field.loss, "AUTO_IS_TRITON", True)
    assert not takes_triton("auto", RELEASE, torch.device("cuda"), **SMALL)


@has_triton
def test_without_a_gpu_it_is_refused_and_auto_does_without(monkeypatch):
    x, pos, uncond, omega, _ = draw()
    with pytest.raises(UserError, match="needs a CUDA device, this is cpu; set hardware"):
        drifting_loss(x, pos, uncond, omega, RELEASE, impl="triton")
    monkeypatch.setattr(drift.field.loss, "AUTO_IS_TRITON", True)
    assert not takes_triton("auto", RELEASE, CPU, **SMALL)


@has_triton
def test_a_gpu_with_too_little_shared_memory_is_refused(monkeypatch):
    monkeypatch.setattr(drift.field.loss, "AUTO_IS_TRITON", True)
    gpu, there = torch.device("cuda"), {"kib": 227}  # an H100
    monkeypatch.setattr(drift.field.loss, "_shared_bytes", lambda device: 1024 * there["kib"])
    assert takes_triton("auto", RELEASE, gpu, **SMALL) and takes_triton("triton", RELEASE, gpu, **SMALL)
    there["kib"] = 99  # a GPU of capability 8.6 or 8.9
    assert not takes_triton("auto", RELEASE, gpu, **SMALL)
    with pytest.raises(UserError, match="bytes of shared memory, this GPU has 101376; set hardware"):
        takes_triton("triton", RELEASE, gpu, **SMALL)
