"""torch.compile and the way back from it."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from drift.training.compile import Compiled


def compile_by(monkeypatch, forward, backward=None):
    """Let torch.compile take a backend that needs no C++ compiler."""
    torch.compiler.reset()
    compile, backend = torch.compile, aot_autograd(fw_compiler=forward, bw_compiler=backward or forward)
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend=backend, **how))


def working(graph, inputs):
    return make_boxed_func(graph.forward)


def broken(graph, inputs):
    raise RuntimeError("no such compiler")


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


@pytest.mark.parametrize(("forward", "backward"), [(broken, working), (working, broken)])
def test_compiling_that_fails_in_either_pass_is_said_once_and_goes_on_uncompiled(
    monkeypatch, capsys, forward, backward
):
    expected = values_and_gradients(network)
    compile_by(monkeypatch, forward, backward)
    found = values_and_gradients(Compiled(network, "network"))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    out = capsys.readouterr().out
    assert out.count("torch.compile of the network has failed") == 1 and "no such compiler" in out


def test_an_error_of_the_network_itself_is_not_taken_for_one_of_compiling(monkeypatch, capsys):
    compile_by(monkeypatch, working)
    compiled = Compiled(lambda a, b: a @ b, "network")
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        compiled(torch.ones(2, 3), torch.ones(2, 3))
    assert capsys.readouterr().out == ""
    assert torch.equal(compiled(torch.ones(2, 3), torch.ones(3, 2)), torch.full((2, 2), 3.0))


@pytest.mark.parametrize("deterministic", [False, True])
def test_compiled_functions_have_the_same_values_and_gradients(monkeypatch, capsys, deterministic):
    passes, seen = [], []

    def counting(graph, inputs):
        seen.append(torch._inductor.config.deterministic)
        compiled = working(graph, inputs)

        def run(arguments):
            passes.append(graph)
            return compiled(arguments)

        run._boxed_call = True
        return run

    expected = values_and_gradients(network)
    compile_by(monkeypatch, counting)
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = values_and_gradients(Compiled(network, "network"))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, expected)
    assert len(passes) == 6 and len(set(passes)) == 2  # three times forward and backward, not as they are
    assert seen == [deterministic, deterministic] and capsys.readouterr().out == ""


def test_parameters_of_a_compiled_module_are_its_own_once(monkeypatch):
    compile_by(monkeypatch, working)
    plain = torch.nn.Linear(3, 2)
    compiled = Compiled(plain, "layer")
    assert [id(p) for p in compiled.parameters()] == [id(p) for p in plain.parameters()]
    assert torch.equal(compiled(torch.ones(1, 3)), plain(torch.ones(1, 3)))
