from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import transformer_lens_taskvec as tv

V = torch.tensor([1.0, -2.0, 0.5, 3.0])


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("intervention", "expected"),
    [
        (tv.inject(V, 0), lambda a: V.expand_as(a)),
        (tv.inject(V, 0, scale=2.0), lambda a: 2 * V.expand_as(a)),
        (tv.inject(V, 0, mode="add", scale=-0.5), lambda a: a - 0.5 * V),
        (tv.inject(V, 0, mode=lambda a, v: a * v), lambda a: a * V),
        (tv.ablate(0), torch.zeros_like),
        (tv.ablate(0, mean=V), lambda a: V.expand_as(a)),
        (
            tv.ablate(0, direction=V),
            lambda a: a - (a @ V)[:, None] * V / V.square().sum(),
        ),
    ],
    ids=["replace", "scaled", "add", "callable", "zero", "mean", "project"],
)
def test_each_mode_does_to_the_last_position_what_its_formula_says(
    intervention: tv.Intervention, expected: Any
) -> None:
    before = rows()
    kept = before.clone()
    after = intervention(before)
    torch.testing.assert_close(after[:, -1], expected(before[:, -1]))
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert torch.equal(before, kept)


def test_projecting_out_leaves_nothing_along_the_direction() -> None:
    after = tv.ablate(0, direction=V, position=None)(rows())
    torch.testing.assert_close(after @ V, torch.zeros(2, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", [0, -2, (0, -1), None])
def test_only_the_asked_positions_change(position: Any) -> None:
    before = rows()
    changed = (tv.ablate(0, position=position)(before) != before).any(dim=-1)
    wanted = {0: [0], -2: [1], (0, -1): [0, 2], None: [0, 1, 2]}[position]
    assert changed.tolist() == [[at in wanted for at in range(3)]] * 2


def test_one_head_changes_alone() -> None:
    before = torch.randn(2, 3, 5, 4)
    after = tv.inject(V, 0, hook="z", head=3)(before)
    torch.testing.assert_close(after[:, -1, 3], V.expand(2, 4))
    unchanged = torch.ones(2, 3, 5, dtype=torch.bool)
    unchanged[:, -1, 3] = False
    assert torch.equal(after[unchanged], before[unchanged])


def test_an_intervention_is_a_pair_for_fwd_hooks() -> None:
    intervention = tv.inject(V, 7, hook="mlp_out")
    name, function = intervention
    assert name == "blocks.7.hook_mlp_out"
    assert function is intervention


def test_interventions_compare_and_print_by_their_fields() -> None:
    assert tv.inject(V, 1) == tv.inject(V.clone(), 1)
    assert hash(tv.inject(V, 1)) == hash(tv.inject(V.clone(), 1))
    different = [tv.inject(V, 2), tv.inject(2 * V, 1), tv.inject(V, 1, scale=2), tv.ablate(1)]
    assert all(tv.inject(V, 1) != other for other in different)
    assert repr(tv.inject(V, 1, mode="add", position=-2)) == (
        "Intervention(blocks.1.hook_resid_post, add, |v|=3.77, position=-2)"
    )


def test_the_declarative_form_is_that_of_a_remote_bridge() -> None:
    assert tv.inject(V, 1, mode="add", scale=2.0).spec() == {
        "blocks.1.hook_out": {"op": "add", "value": [2.0, -4.0, 1.0, 6.0], "pos": -1}
    }
    assert tv.ablate(0, position=None).spec() == {"blocks.0.hook_out": {"op": "suppress"}}
    with pytest.raises(ValueError, match="no declarative form"):
        tv.ablate(0, direction=V).spec()


def test_the_declarative_form_is_accepted_by_transformer_lens() -> None:
    inspect = pytest.importorskip("transformer_lens.model_bridge.sources.inspect.intervention")
    for hook in ("resid_pre", "resid_post", "attn_out", "mlp_out", "z"):
        spec = tv.inject(V, 1, hook=hook).spec()
        built = inspect.build_interventions(spec, frozenset(spec))
        assert list(built.values()) == list(spec.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tv.inject(V[None], 0), r"one vector \[d\], got \(1, 4\)"),
        (lambda: tv.inject(V / 0, 0), "NaN or infinite"),
        (lambda: tv.inject(V, -1), "layer is -1"),
        (lambda: tv.inject(V, 0, mode="swap"), "mode is 'swap'"),
        (lambda: tv.ablate(0, mean=V, direction=V), "mean and direction are both given"),
        (lambda: tv.ablate(0, direction=0 * V), "zero vector"),
        (lambda: tv.inject(V, 0)(torch.zeros(1, 1, 5)), "has width 4.*there 5"),
        (lambda: tv.inject(V, 0, position=3)(rows()), "position 3 is outside a prompt of 3"),
        (lambda: tv.inject(V, 0, mode=lambda a, v: a[:1])(rows()), "must return the shape"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.model
def test_injection_at_the_last_layer_is_the_unembedded_vector(
    model: Any, vectors: tv.TaskVectors, episodes: list[tv.Episode]
) -> None:
    vector = vectors["en_fr", 2]
    tokens = torch.tensor([model.tokenizer.encode(episodes[0].prompt, add_special_tokens=False)])
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[tv.inject(vector, 2)])
        normalised = vector / (vector.square().mean() + 1e-6).sqrt() * model.ln_final.w
        expected = normalised @ model.W_U
    torch.testing.assert_close(logits[0, -1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.model
def test_an_episodes_own_activation_injected_changes_nothing(
    model: Any, episodes: list[tv.Episode]
) -> None:
    plain = tv.evaluate(model, episodes[:1])
    values = tv.collect(model, episodes[:1]).values[0]
    for layer in range(3):
        same = tv.evaluate(model, episodes[:1], [tv.inject(values[layer], layer)])
        torch.testing.assert_close(same.loss, plain.loss, atol=1e-4, rtol=1e-5)


@pytest.mark.model
def test_interventions_work_in_the_hooks_context_of_the_model(
    model: Any, vectors: tv.TaskVectors
) -> None:
    tokens = torch.tensor([[5, 6, 7]])
    intervention = tv.inject(vectors["en_fr", 1], 1)
    with torch.no_grad():
        direct = model.run_with_hooks(tokens, fwd_hooks=[intervention])
        with model.hooks(fwd_hooks=[intervention]):
            within = model(tokens)
        without = model(tokens)
    assert torch.equal(direct, within)
    assert not torch.allclose(within[0, -1], without[0, -1])
    torch.testing.assert_close(within[0, :-1], without[0, :-1])


@pytest.mark.usefixtures("unchecked")
def test_a_layer_may_be_any_whole_number() -> None:
    edit = tv.inject(torch.ones(3), np.int64(2))
    assert edit.layer == 2 and type(edit.layer) is int
    with pytest.raises(ValueError, match=r"layer is 2\.0"):
        tv.inject(torch.ones(3), 2.0)  # type: ignore[arg-type]
