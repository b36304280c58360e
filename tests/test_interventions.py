from __future__ import annotations

from dataclasses import replace
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
    assert tv.inject(V, 1, mode="add", scale=2.0).spec(prompt_length=7) == {
        "blocks.1.hook_out": {"op": "add", "value": [2.0, -4.0, 1.0, 6.0], "pos": 6}
    }
    assert tv.ablate(0, position=None).spec() == {"blocks.0.hook_out": {"op": "suppress"}}
    with pytest.raises(ValueError, match="no declarative form"):
        tv.ablate(0, direction=V).spec()


@pytest.mark.parametrize(
    ("position", "pos"), [(-1, 4), (0, 0), (-5, 0), (4, 4), ((0, -2), [0, 3]), (None, None)]
)
def test_the_declarative_form_counts_positions_from_the_start_of_the_prompt(
    position: Any, pos: Any
) -> None:
    """A server would refuse -1, or take it for the last token of every pass."""
    intervention = tv.inject(V, 1, position=position)
    [spec] = intervention.spec(prompt_length=5).values()
    assert spec.get("pos") == pos
    if position in (-1, -5, (0, -2)):
        with pytest.raises(ValueError, match=r"counts from the prompt's end.*prompt_length=12"):
            intervention.spec()
    else:
        assert list(intervention.spec().values()) == [spec]
    if position in (4, -5, (0, -2)):
        with pytest.raises(ValueError, match=r"position -?\d is outside a prompt of 1 token"):
            intervention.spec(prompt_length=1)


@pytest.mark.parametrize("hook", ["resid_pre", "resid_post", "attn_out", "mlp_out", "z"])
@pytest.mark.parametrize("position", [-1, (0, -1), None])
def test_the_declarative_form_is_accepted_by_transformer_lens(hook: str, position: Any) -> None:
    sources = "transformer_lens.model_bridge.sources"
    inspect = pytest.importorskip(f"{sources}.inspect.intervention")
    vllm = pytest.importorskip(f"{sources}.vllm.intervention_specs")
    for make in (lambda **at: tv.inject(V, 1, **at), lambda **at: tv.ablate(1, **at)):
        spec = make(hook=hook, position=position).spec(prompt_length=9)
        built = inspect.build_interventions(spec, frozenset(spec))
        assert list(built.values()) == list(spec.values())
        for name, one in spec.items():
            assert vllm.validate_spec(name, one, width=len(V)) == one


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
        (lambda: tv.inject(V, 0, position=1.5), r"position is 1\.5; it must be a whole number"),
        (lambda: tv.inject(V, 0, position=True), "position is True"),
        (lambda: tv.ablate(0, position="last"), "position is 'last'"),
        (lambda: tv.ablate(0, position=[]), r"position is \[\]"),
        (lambda: tv.ablate(0, position=[0, 1.0]), r"position is \[0, 1\.0\]"),
        (lambda: tv.ablate(0, position=torch.tensor(1)), r"position is tensor\(1\)"),
        (lambda: tv.inject(V, 0, scale=float("nan")), "scale is nan; it must be a finite number"),
        (lambda: tv.inject(V, 0, scale=-float("inf")), "scale is -inf"),
        (lambda: tv.inject(V, 0, scale=V[:1]), r"scale is tensor\(\[1\.\]\)"),
        (lambda: tv.ablate(0, hook="z", head=-1), "head is -1; it must be 0 or a positive whole"),
        (lambda: tv.ablate(0, hook="z", head=1.0), r"head is 1\.0"),
        (lambda: tv.ablate(0, hook="z", head=True), "head is True"),
        (lambda: replace(tv.ablate(0), position=()), r"position is \(\)"),
        (lambda: tv.ablate(1, hook="pattern"), r"hook is 'pattern', whose .*query, key"),
        (lambda: tv.ablate(1, hook="attn_scores", head=2), "hook is 'attn_scores'"),
        (lambda: tv.ablate(1, hook="attn.hook_pattern", position=None), "hook is 'attn.hook_p"),
        (lambda: tv.ablate(0, head=1)(rows()), "head is 1, but .*hook_resid_post has no axis"),
        (lambda: tv.ablate(0, hook="k", head=4)(torch.ones(1, 2, 4, 4)), "head is 4.*heads 0 to 3"),
        (lambda: tv.ablate(0, hook="mlp.gate.hook_out")(rows()[0]), r"has shape \(3, 4\), and \["),
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


@pytest.mark.model
@pytest.mark.parametrize("mode", ["replace", "add", "project"])
def test_gradients_reach_the_vector_as_in_plain_torch(
    model: Any, episodes: list[tv.Episode], mode: str
) -> None:
    tokens = torch.tensor([model.tokenizer.encode(episodes[0].prompt, add_special_tokens=False)])
    start = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def plain(vector: torch.Tensor) -> Any:
        def edit(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            last = activation[:, -1]
            unit = vector / vector.norm()
            new = {
                "replace": vector.expand_as(last),
                "add": last + vector,
                "project": last - (last @ unit)[:, None] * unit,
            }[mode]
            return torch.cat([activation[:, :-1], new[:, None]], dim=1)

        return "blocks.1.hook_resid_post", edit

    gradients = []
    for make in (plain, lambda theta: tv.inject(theta, 1, mode=mode)):
        theta = start.clone().requires_grad_()
        edit = make(theta)
        for _ in range(2):  # the same intervention in several steps of a training
            loss = model.run_with_hooks(tokens, fwd_hooks=[edit])[0, -1].log_softmax(-1)[7]
            loss.backward()
        gradients.append(theta.grad)
        with torch.no_grad():
            theta += 1.0
            moved = model.run_with_hooks(tokens, fwd_hooks=[edit])[0, -1].log_softmax(-1)[7]
        gradients.append(moved[None])
    torch.testing.assert_close(gradients[2], gradients[0], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(gradients[3], gradients[1], atol=1e-4, rtol=1e-5)
    assert gradients[0].norm() > 1e-3


@pytest.mark.model
def test_scores_of_a_vector_that_requires_gradients_are_plain_numbers(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    vector = vectors["en_fr", 1]
    theta = vector.clone().requires_grad_()
    expected = tv.evaluate(model, episodes, [tv.inject(vector, 1)], metrics=["rank"])
    for edit in (tv.inject(theta, 1), tv.inject(2 * theta, 1, scale=0.5)):
        found = tv.evaluate(model, episodes, [edit], metrics=["rank"])
        assert not any(values.requires_grad for values in found.metrics.values())
        assert np.array_equal(found.loss.numpy(), expected.loss.numpy())
        assert repr(edit) and edit == edit and hash(edit) == hash(edit)
        assert edit.spec(prompt_length=3)
        assert tv.generate(model, ["a b c"], [edit], max_new_tokens=1)


def test_an_intervention_keeps_a_vector_of_its_own() -> None:
    vector = V.clone()
    edits = [tv.inject(vector, 0), tv.ablate(0, mean=vector), tv.ablate(0, direction=vector)]
    before = [edit(rows()) for edit in edits]
    vector += 1.0
    for edit, expected in zip(edits, before, strict=True):
        assert torch.equal(edit(rows()), expected)
        assert edit.vector is not None and torch.equal(edit.vector, V)


@pytest.mark.usefixtures("unchecked")
def test_positions_and_heads_may_be_any_whole_numbers() -> None:
    edit = tv.inject(V, 0, hook="z", position=(np.int64(0), -1), head=np.int64(2))
    assert edit.position == (0, -1) and edit.head == 2
    assert [type(one) for one in (*edit.position, edit.head)] == [int] * 3
    assert tv.inject(V, 0, position=range(2), scale=np.float32(0.5)).position == (0, 1)


@pytest.mark.usefixtures("unchecked")
def test_a_layer_may_be_any_whole_number() -> None:
    edit = tv.inject(torch.ones(3), np.int64(2))
    assert edit.layer == 2 and type(edit.layer) is int
    with pytest.raises(ValueError, match=r"layer is 2\.0"):
        tv.inject(torch.ones(3), 2.0)  # type: ignore[arg-type]
