"""How the loss is computed: what backward keeps, in which precision, in which pieces, what it refuses."""

from dataclasses import replace

import pytest
import torch
from field_inputs import draw, loss_and_grad, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from drift.field import FieldSettings, drifting_loss
from drift.field.problems import Problems
from drift.runtime.errors import UserError

RELEASE = FieldSettings()
SETTINGS = {
    "release": RELEASE,
    "sinkhorn": FieldSettings.sinkhorn(),
    "wflow": FieldSettings.wflow(),
    "sinkhorn-split": FieldSettings.sinkhorn(
        coupling="sinkhorn", drift_form="split", dist_metric="l2_sq", sinkhorn_tolerance=0.02
    ),
    "second_batch": replace(RELEASE, negatives="second_batch", coupling="sinkhorn"),
    "unit_vec": replace(RELEASE, drift_unit_vec=True),
    "agg_kernel": FieldSettings.sinkhorn(coupling="sinkhorn", sinkhorn_agg_kernel=True),
}
every_settings = pytest.mark.parametrize("knobs", SETTINGS.values(), ids=SETTINGS.keys())


@every_settings
def test_only_the_drift_is_kept_for_backward(knobs):
    x, pos, uncond, omega, second = (t.requires_grad_() for t in draw())
    negatives = second if knobs.negatives == "second_batch" else None
    loss, statistics = drifting_loss(x, pos, uncond, omega, knobs, negatives=negatives)
    drift, slope = sorted(loss.grad_fn.saved_tensors, key=torch.numel, reverse=True)
    assert drift.shape == x.shape
    assert slope.numel() <= len(omega)
    assert drift.untyped_storage().nbytes() == x.untyped_storage().nbytes()  # not a view of anything larger
    assert not any(value.requires_grad for value in statistics.values())
    loss.backward()
    assert all(t.grad is None for t in (pos, uncond, omega, second))


@pytest.mark.parametrize("knobs", [FieldSettings.wflow(), FieldSettings(normalization_scope="part")])
def test_a_part_of_the_classes_is_as_a_call_of_its_own(knobs):
    inputs = draw(classes=4)  # of different scales
    loss, grad, statistics = loss_and_grad(*inputs, replace(knobs, classes_per_part=2))
    halves = [loss_and_grad(*(t[part] for t in inputs), knobs) for part in (slice(2), slice(2, 4))]
    torch.testing.assert_close(loss, (halves[0][0] + halves[1][0]) / 2)
    assert relative_error(grad, torch.cat([half[1] for half in halves]) / 2) < 1e-6
    for name in ("scale", "neighbours"):
        torch.testing.assert_close(statistics[name], (halves[0][2][name] + halves[1][2][name]) / 2)
    assert relative_error(loss_and_grad(*inputs, knobs)[1], grad) > 1e-2
    with pytest.raises(ValueError, match="classes_per_part = 3: 4 classes"):
        loss_and_grad(*inputs, replace(knobs, classes_per_part=3))


def test_gradient_is_scaled_by_what_follows():
    x, *rest = draw()
    _, grad, _ = loss_and_grad(x, *rest, RELEASE)
    x.requires_grad_()
    loss, _ = drifting_loss(x, *rest[:3], RELEASE)
    (-3 * loss).backward()
    torch.testing.assert_close(x.grad, -3 * grad)


@every_settings
def test_float32_inside_whatever_comes_in(knobs):
    inputs = [t.bfloat16() for t in draw()]
    loss, grad, statistics = loss_and_grad(*(t.float() for t in inputs), knobs)
    with torch.autocast("cpu", torch.bfloat16):
        low_loss, low_grad, low_statistics = loss_and_grad(*inputs, knobs)
    torch.testing.assert_close(low_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(low_statistics, statistics, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(low_grad, grad.bfloat16(), rtol=2**-7, atol=0)  # rounded twice


@pytest.mark.parametrize("chunk_bytes", [1, 6_000, 20_000])  # from one problem to more than a class
@pytest.mark.parametrize("keep_bytes", [0, None], ids=["keep_none", "keep_all"])
@pytest.mark.parametrize("locations", [1, 3])
@every_settings
def test_pieces_make_the_whole(knobs, locations, keep_bytes, chunk_bytes):
    inputs = draw(locations=locations)
    loss, grad, statistics = loss_and_grad(*inputs, knobs)
    in_pieces = loss_and_grad(*inputs, knobs, chunk_bytes=chunk_bytes, keep_bytes=keep_bytes)
    assert relative_error(in_pieces[0], loss) < 1e-6
    assert relative_error(in_pieces[1], grad) < 1e-5
    torch.testing.assert_close(in_pieces[2], statistics, rtol=1e-5, atol=1e-6)


class LargestAllocation(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@every_settings
def test_pieces_bound_the_memory(knobs):
    """One problem at a time, nothing is larger than the generated vectors themselves."""
    inputs = draw(classes=1, n=16, p=8, locations=50, channels=2)
    with LargestAllocation() as whole:
        loss_and_grad(*inputs, knobs)
    with LargestAllocation() as pieces:
        loss_and_grad(*inputs, knobs, chunk_bytes=1, keep_bytes=0)
    assert pieces.bytes == inputs[0].untyped_storage().nbytes()
    assert whole.bytes > 7 * pieces.bytes


def test_what_there_is_room_for_is_kept_between_passes(monkeypatch):
    inputs = draw(locations=4)  # of three classes: twelve problems
    measured = []
    measure = Problems._measure
    monkeypatch.setattr(
        Problems, "_measure", lambda self, chunk: measured.append(chunk) or measure(self, chunk)
    )

    def measured_per_problem(keep_bytes):
        measured.clear()
        loss_and_grad(*inputs, RELEASE, chunk_bytes=1, keep_bytes=keep_bytes)
        return len(measured) / 12

    assert measured_per_problem(None) == 1
    assert measured_per_problem(0) == 3  # for distances, for fields, for V


def test_negatives_are_given_exactly_where_the_settings_want_them():
    x, pos, uncond, omega, second = draw()
    with pytest.raises(ValueError, match="second_batch"):
        drifting_loss(x, pos, uncond, omega, replace(RELEASE, negatives="second_batch"))
    with pytest.raises(ValueError, match="self"):
        drifting_loss(x, pos, uncond, omega, RELEASE, negatives=second)


def test_contradictions_are_the_users_mistake():
    x, pos, uncond, omega, _ = draw()
    with pytest.raises(UserError, match="alg2_impl"):
        drifting_loss(x, pos, uncond, omega, replace(RELEASE, coupling="sinkhorn", alg2_impl="kernel"))
