"""The regression transformer: GPT-2's function, TransformerLens' names."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from transformer_lens_taskvec.lab.model import RegressionConfig, RegressionTransformer, interleave

pytestmark = pytest.mark.usefixtures("one_thread")

CFG = RegressionConfig(d_input=3, n_points=5, n_layers=2, n_heads=2, d_model=8, init="fan_in")


@pytest.fixture
def model() -> Any:
    """A model whose every parameter matters."""
    model = RegressionTransformer(CFG, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 5, 3, generator=generator), torch.randn(4, 5, generator=generator)


def test_it_computes_what_gpt2_of_transformers_computes(
    model: Any, data: tuple[Tensor, Tensor]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=1,
        n_positions=CFG.n_ctx,
        n_embd=8,
        n_layer=2,
        n_head=2,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    theirs = transformers.GPT2Model(config).eval()
    with torch.no_grad():
        theirs.wpe.weight.copy_(model.W_pos)
        for block, other in zip(model.blocks, theirs.h, strict=True):
            pairs = [
                (other.attn.c_attn.weight, block.attn.w_qkv.reshape(-1, 8).T),
                (other.attn.c_attn.bias, block.attn.bias_qkv),
                (other.attn.c_proj.weight, block.attn.w_o.T),
                (other.attn.c_proj.bias, block.attn.bias_o),
                (other.mlp.c_fc.weight, block.mlp.w_in.T),
                (other.mlp.c_fc.bias, block.mlp.bias_in),
                (other.mlp.c_proj.weight, block.mlp.w_out.T),
                (other.mlp.c_proj.bias, block.mlp.bias_out),
                (other.ln_1.weight, block.ln1.weight),
                (other.ln_1.bias, block.ln1.bias),
                (other.ln_2.weight, block.ln2.weight),
                (other.ln_2.bias, block.ln2.bias),
            ]
            for target, value in pairs:
                target.copy_(value)
        theirs.ln_f.weight.copy_(model.ln_final.weight)
        theirs.ln_f.bias.copy_(model.ln_final.bias)
        embedded = model.read_in(interleave(*data))
        expected = model.read_out(theirs(inputs_embeds=embedded).last_hidden_state)[:, ::2, 0]
        torch.testing.assert_close(model(*data), expected, atol=1e-5, rtol=1e-5)


def test_a_prediction_sees_the_pairs_before_it_and_its_own_x_alone(
    model: Any, data: tuple[Tensor, Tensor]
) -> None:
    xs, ys = data
    before = model(xs, ys)
    changed_y, changed_x = ys.clone(), xs.clone()
    changed_y[:, 2] += 1.0
    changed_x[:, 2] += 1.0
    by_y = (model(xs, changed_y) - before).abs().amax(0) > 1e-6
    by_x = (model(changed_x, ys) - before).abs().amax(0) > 1e-6
    assert by_y.tolist() == [False, False, False, True, True]
    assert by_x.tolist() == [False, False, True, True, True]


def test_the_last_y_is_never_read_and_tokens_serve_as_well(
    model: Any, data: tuple[Tensor, Tensor]
) -> None:
    xs, ys = data
    expected = model(xs, ys)
    torch.testing.assert_close(model(xs, ys[:, :-1]), expected)
    torch.testing.assert_close(model(interleave(xs, ys)), expected)
    torch.testing.assert_close(model(xs[:, :3], ys[:, :3]), expected[:, :3])


def test_hook_points_are_transformer_lens_own(model: Any, data: tuple[Tensor, Tensor]) -> None:
    _, cache = model.run_with_cache(*data)
    batch, pos, head = 4, CFG.n_ctx, 2
    shapes: dict[str, tuple[int, ...]] = {
        "hook_embed": (batch, pos, 8),
        "hook_pos_embed": (batch, pos, 8),
        "ln_final.hook_normalized": (batch, pos, 8),
    }
    for layer in range(2):
        block = f"blocks.{layer}"
        for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"):
            shapes[f"{block}.hook_{name}"] = (batch, pos, 8)
        for name in "qkvz":
            shapes[f"{block}.attn.hook_{name}"] = (batch, pos, head, 4)
        for name in ("attn_scores", "pattern"):
            shapes[f"{block}.attn.hook_{name}"] = (batch, head, pos, pos)
        for name in ("pre", "post"):
            shapes[f"{block}.mlp.hook_{name}"] = (batch, pos, 32)
        for name in ("ln1", "ln2"):
            shapes[f"{block}.{name}.hook_normalized"] = (batch, pos, 8)
    assert {name: tuple(value.shape) for name, value in cache.items()} == shapes
    for layer in range(2):
        block = f"blocks.{layer}"
        middle = cache[f"{block}.hook_resid_pre"] + cache[f"{block}.hook_attn_out"]
        torch.testing.assert_close(cache[f"{block}.hook_resid_mid"], middle)
        torch.testing.assert_close(
            cache[f"{block}.hook_resid_post"], middle + cache[f"{block}.hook_mlp_out"]
        )


def test_the_pattern_is_made_only_when_it_is_looked_at_and_changes_nothing(
    model: Any, data: tuple[Tensor, Tensor]
) -> None:
    seen: list[Tensor] = []

    def look(pattern: Tensor, hook: Any) -> None:
        seen.append(pattern)

    plain = model(*data)
    hooked = model.run_with_hooks(*data, fwd_hooks=[("blocks.1.attn.hook_pattern", look)])
    torch.testing.assert_close(hooked, plain)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(4, 2, CFG.n_ctx))
    assert (seen[0].triu(1) == 0).all()
    values = model.run_with_cache(*data)[1]["blocks.1.attn.hook_v"]
    z = model.run_with_cache(*data, names_filter="blocks.1.attn.hook_z")[1]["blocks.1.attn.hook_z"]
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", seen[0], values), z)


def test_hooks_that_change_heads_change_the_prediction(
    model: Any, data: tuple[Tensor, Tensor]
) -> None:
    def without_head_one(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, 1] = 0.0
        return z

    hooked = model.run_with_hooks(*data, fwd_hooks=[("blocks.0.attn.hook_z", without_head_one)])
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned.blocks[0].attn.W_O[1] = 0.0
        torch.testing.assert_close(hooked, pruned(*data))
        assert not torch.allclose(hooked, model(*data))


def test_heads_output_maps_add_up_to_the_attention_output(
    model: Any, data: tuple[Tensor, Tensor]
) -> None:
    _, cache = model.run_with_cache(*data)
    attention = model.blocks[1].attn
    assert attention.W_O.shape == (2, 4, 8)
    by_head = torch.einsum("bphd,hdm->bphm", cache["blocks.1.attn.hook_z"], attention.W_O)
    torch.testing.assert_close(by_head.sum(2) + attention.b_O, cache["blocks.1.hook_attn_out"])


def test_initial_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, same, other = (RegressionTransformer(CFG, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    states = [model.state_dict() for model in (one, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["W_pos"], states[2]["W_pos"])
    assert all(value.isfinite().all() for value in states[0].values())


def test_projections_into_the_residual_stream_start_smaller() -> None:
    scales: tuple[Literal["gpt2", "fan_in"], ...] = ("gpt2", "fan_in")
    for init in scales:
        cfg = RegressionConfig(n_layers=8, d_model=64, init=init)
        block: Any = RegressionTransformer(cfg).blocks[0]
        for weight in (block.attn.w_o, block.mlp.w_out):
            torch.testing.assert_close(weight.std(), torch.tensor(0.005), rtol=0.1, atol=0)
        assert block.attn.w_qkv.std() > 3 * block.attn.w_o.std()


def test_wrong_shapes_are_named(model: Any) -> None:
    with pytest.raises(ValueError, match="at most 9 tokens"):
        model(torch.zeros(1, 6, 3), torch.zeros(1, 6))
    with pytest.raises(ValueError, match="of 3 dimensions"):
        model(torch.zeros(1, 5, 4), torch.zeros(1, 5))
    with pytest.raises(ValueError, match="ys has shape"):
        model(torch.zeros(1, 5, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="multiple of n_heads"):
        RegressionConfig(d_model=9, n_heads=2)
