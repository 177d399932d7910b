import math

import pytest
import torch
from golden_weights import golden_config, golden_numbers, golden_params, relative_error

from drift.interop.release import convert_generator
from drift.models.generator import Generator, rope, rotate
from drift.runtime.errors import UserError

TINY = {
    "in_channels": 3, "input_size": 4, "num_classes": 5, "hidden_size": 16, "depth": 2, "num_heads": 2,
    "patch_size": 2, "context_tokens": 3, "style_codebooks": 4, "style_entries": 6,
}  # fmt: skip


def tiny_model(**changes):
    """A small generator whose layers that start at zero have been filled."""
    torch.manual_seed(0)
    model = Generator(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.2)
    return model.eval()


def inputs(batch=3, codebooks=4):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, 3, 4, 4, generator=generator)
    labels = torch.randint(5, (batch,), generator=generator)
    omega = 1 + 3 * torch.rand(batch, generator=generator)
    style = torch.randint(6, (batch, codebooks), generator=generator)
    return noise, labels, omega, style


@torch.no_grad()
def test_condition_and_latent_match_the_release():
    model = convert_generator(golden_params("release_generator"), golden_config("release_generator"))
    numbers = {name: torch.from_numpy(array) for name, array in golden_numbers("release_generator").items()}
    conditions = numbers["labels"], numbers["omega"], numbers["style_indices"]
    assert relative_error(model.condition(*conditions), numbers["cond"]) < 1e-4
    latent = model(numbers["noise"].permute(0, 3, 1, 2), *conditions)
    assert relative_error(latent.permute(0, 2, 3, 1), numbers["latent"]) < 1e-4


@torch.no_grad()
def test_initialisation():
    torch.manual_seed(0)
    model = Generator(**{**TINY, "hidden_size": 64, "num_heads": 4, "num_classes": 200})
    assert not model(*inputs()).any()
    tokens = torch.randn(2, 7, 64)
    block = model.blocks[0]
    assert torch.equal(
        block(tokens, block.modulation(torch.randn(2, 64)), rope(7, 16, tokens.device)), tokens
    )
    for weight in (model.class_embedding.weight, model.omega_embedder.mlp[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    qkv = block.attention.qkv
    bound = math.sqrt(6 / (64 + 192))
    assert 0.99 * bound < qkv.weight.abs().max().item() <= bound and not qkv.bias.any()


def test_position_embedding_starts_as_sines_and_cosines_of_both_coordinates():
    position = Generator(**{**TINY, "input_size": 6}).position_embedding[
        0
    ]  # [9, 16]: four frequencies, two functions, two axes
    for row in range(3):
        for column in range(3):
            expected = []
            for place in (column, row):
                angles = [place / 10_000 ** (i / 4) for i in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert position[3 * row + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_rotation_is_a_product_of_complex_numbers():
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    planes = torch.complex(x[..., :4], x[..., 4:])
    angles = torch.arange(5)[:, None] * torch.tensor(
        [10_000 ** (-i / 4) for i in range(4)], dtype=torch.float64
    )
    expected = planes * torch.polar(torch.ones_like(angles), angles)
    cos, sin = rope(5, 8, x.device)
    found = rotate(x, cos.double(), sin.double())
    torch.testing.assert_close(found, torch.cat([expected.real, expected.imag], -1), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_style_indices_are_drawn_if_none_are_given():
    model, seen = tiny_model(), []
    model.style_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    noise, labels, omega, _ = inputs(6000)
    drawn = model(noise, labels, omega)
    assert torch.equal(drawn, model(noise, labels, omega, seen[0]))
    counts = torch.stack([column.bincount(minlength=6) for column in seen[0].T])
    assert (counts - 1000).abs().max() < 150  # five standard deviations


def test_without_styles_and_context_tokens():
    changes = {"style_codebooks": 0, "context_tokens": 0}
    model = tiny_model(**changes)
    noise, labels, omega, style = inputs(codebooks=0)
    latents = model(noise, labels, omega, style)
    assert torch.equal(latents, model(noise, labels, omega))
    latents.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_compiles_to_one_graph_with_the_same_gradient():
    # Compiled as a whole, so nothing in it waits for a value on the device
    model = tiny_model(depth=1)
    results = []
    for network in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        latents = network(*inputs())
        gradient = torch.autograd.grad(latents.square().mean(), list(model.parameters()))
        results.append([latents.detach(), *gradient])
        assert all(g.any() for g in gradient)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_conditioning_stays_float32_under_mixed_precision():
    model = tiny_model()
    exact = model(*inputs())
    seen = {}
    names = "omega_embedder", "context_projection", "blocks.1.modulation", "final.modulation", "blocks.1.mlp"
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, x, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        latents = model(*inputs())
    assert latents.dtype == torch.float32
    assert seen.pop("blocks.1.mlp") == torch.bfloat16
    assert set(seen.values()) == {torch.float32}
    assert relative_error(latents, exact) < 0.05


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_heads": 3}, "num_heads is 3"),
        ({"num_heads": 16}, "num_heads is 16"),  # an odd head size
        ({"hidden_size": 18, "num_heads": 1}, "hidden_size is 18"),
        ({"patch_size": 3}, "patch_size is 3"),
        ({"style_codebooks": -1}, "style_codebooks is -1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
    ],
)
def test_impossible_sizes_are_refused(changes, named):
    with pytest.raises(UserError, match=named):
        Generator(**{**TINY, **changes})
