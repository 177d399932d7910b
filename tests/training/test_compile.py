"""torch.compile and the way back from it."""

import pytest
import torch

from drift.training.compile import Compiled


def double(x):
    return 2 * x + 1


def test_compiling_that_fails_is_told_once_and_goes_on_uncompiled(monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no such compiler")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=broken))
    network = Compiled(double, "network")
    for _ in range(3):
        assert torch.equal(network(torch.arange(3)), torch.tensor([1, 3, 5]))
    out = capsys.readouterr().out
    assert out.count("torch.compile of the network has failed") == 1 and "no such compiler" in out


def test_an_error_of_the_network_itself_is_not_taken_for_one_of_compiling(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager"))
    with pytest.raises((RuntimeError, TypeError)) as caught:
        Compiled(lambda a, b: a @ b, "network")(torch.ones(2, 3), torch.ones(2, 3))
    assert "failed" not in str(caught.value).splitlines()[0]


def test_a_compiled_function_has_the_same_values_and_gradients(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="aot_eager"))
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))

    def network(x):
        return torch.tanh(x @ weight).square().sum()

    compiled, results = Compiled(network, "network"), []
    for call in (network, compiled):
        x = torch.linspace(-1, 1, 15).view(3, 5).requires_grad_()
        value = call(x)
        value.backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])
    assert compiled._fast is not None
