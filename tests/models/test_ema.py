import torch
from torch import nn

from drift.models.ema import EMA


class Module(nn.Module):
    def __init__(self, seed, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype))
        self.register_buffer("running", torch.randn(3, generator=generator).to(dtype))


def test_average_has_its_closed_form():
    decay, modules = 0.9, [Module(seed) for seed in range(20)]
    ema = EMA(modules[0], decay)
    for module in modules[1:]:
        ema.update(module)
    n = len(modules) - 1
    for name in ("weight", "running"):
        expected = decay**n * getattr(modules[0], name).detach().double()
        for k, module in enumerate(modules[1:], start=1):
            expected += (1 - decay) * decay ** (n - k) * getattr(module, name).detach().double()
        torch.testing.assert_close(ema.state_dict()[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_slow_average_of_bfloat16_weights_moves():
    # In bfloat16 a step of 1e-4 would be rounded away
    module = Module(0, torch.bfloat16)
    ema = EMA(module, 0.9999)
    before = ema.state_dict()["weight"].clone()
    with torch.no_grad():
        module.weight.add_(1)
    step = (module.weight.detach().float() - before) * 1e-4
    for _ in range(10):
        ema.update(module)
    torch.testing.assert_close(ema.state_dict()["weight"] - before, 10 * step, rtol=2e-3, atol=1e-6)


def test_average_shares_no_memory_with_the_module():
    module = Module(0)
    ema, before = EMA(module, 0.5), module.weight.detach().clone()
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(ema.state_dict()["weight"], before)
    ema.copy_to(module)
    assert torch.equal(module.weight, before) and module.weight.requires_grad
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(ema.state_dict()["weight"], before)


def test_restored_average_continues_to_the_bit():
    modules = [Module(seed) for seed in range(6)]
    whole = EMA(modules[0], 0.99)
    for module in modules[1:4]:
        whole.update(module)
    restored = EMA(modules[5], 0.99)
    restored.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    for ema in (whole, restored):
        ema.update(modules[4])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name])
