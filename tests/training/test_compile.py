"""torch.compile and the way back from it."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from drift.training.compile import Compiled


def compile_by(monkeypatch, backend):
    """Let torch.compile take a backend that needs no C++ compiler."""
    torch.compiler.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend=backend, **how))


def working(graph, inputs):
    return make_boxed_func(graph.forward)


def broken(graph, inputs):
    raise RuntimeError("no such compiler")


FAILING = {
    "forward": aot_autograd(fw_compiler=broken, bw_compiler=working),
    "backward": aot_autograd(fw_compiler=working, bw_compiler=broken),
}
WEIGHT = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))


def network(x):
    return torch.tanh(x @ WEIGHT).square().sum()


def values_and_gradients(call):
    """Of three calls."""
    results = []
    for scale in (1.0, 2.0, 3.0):
        x = (scale * torch.linspace(-1, 1, 15).view(3, 5)).requires_grad_()
        value = call(x)
        value.backward()
        results += [value.detach(), x.grad]
    return results


@pytest.mark.parametrize("failing", FAILING)
def test_compiling_that_fails_in_either_pass_is_told_once_and_goes_on_uncompiled(
    monkeypatch, capsys, failing
):
    expected = values_and_gradients(network)
    compile_by(monkeypatch, FAILING[failing])
    found = values_and_gradients(Compiled(network, "network"))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    out = capsys.readouterr().out
    assert out.count("torch.compile of the network has failed") == 1 and "no such compiler" in out


def test_a_network_without_gradients_needs_no_backward_pass(monkeypatch, capsys):
    compile_by(monkeypatch, FAILING["backward"])
    compiled = Compiled(network, "network")
    with torch.no_grad():
        assert torch.equal(compiled(torch.ones(3, 5)), network(torch.ones(3, 5)))
    assert capsys.readouterr().out == ""


def test_an_error_of_the_network_itself_is_not_taken_for_one_of_compiling(monkeypatch, capsys):
    compile_by(monkeypatch, "aot_eager")
    compiled = Compiled(lambda a, b: a @ b, "network")
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        compiled(torch.ones(2, 3), torch.ones(2, 3))
    assert capsys.readouterr().out == ""
    assert torch.equal(compiled(torch.ones(2, 3), torch.ones(3, 2)), torch.full((2, 2), 3.0))


def test_a_compiled_function_has_the_same_values_and_gradients(monkeypatch, capsys):
    passes = []

    def counting(graph, inputs):
        compiled = working(graph, inputs)

        def run(arguments):
            passes.append(graph)
            return compiled(arguments)

        run._boxed_call = True
        return run

    expected = values_and_gradients(network)
    compile_by(monkeypatch, aot_autograd(fw_compiler=counting))
    found = values_and_gradients(Compiled(network, "network"))
    torch.testing.assert_close(found, expected)
    assert len(passes) == 6 and len(set(passes)) == 2  # three times forward and backward, not as they are
    assert capsys.readouterr().out == ""


@pytest.fixture(params=[False, True])
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def test_what_compiles_is_told_of_deterministic_algorithms(monkeypatch, deterministic):
    told = []

    def telling(graph, inputs):
        told.append(torch._inductor.config.deterministic)
        return working(graph, inputs)

    compile_by(monkeypatch, aot_autograd(fw_compiler=telling))
    values_and_gradients(Compiled(network, "network"))
    assert told == [deterministic, deterministic]
