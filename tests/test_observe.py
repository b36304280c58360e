"""What is observed while scoring is what ``collect`` gives: the unedited pass, on every model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab

pytestmark = pytest.mark.filterwarnings("ignore:.*one intervention at a time")
HOOKS = ["resid_post", "resid_pre", "attn_out", "mlp_out", "z", "q", "v"]


def variants_with(vectors: tv.TaskVectors, *, plain: bool) -> list[list[tv.Intervention]]:
    edits = [vectors.inject("en_fr", layer) for layer in range(3)]
    early = [tv.inject(vectors["en_fr", 0], 0, position=1)]  # runs by itself
    return [*([[]] if plain else []), *edits, early]


@pytest.mark.model
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("max_tokens", [None, 60])
def test_the_unedited_pass_is_observed_whatever_the_variants(
    model: Any,
    episodes: list[tv.Episode],
    vectors: tv.TaskVectors,
    hook: str,
    plain: bool,
    max_tokens: int | None,
) -> None:
    variants = variants_with(vectors, plain=plain)
    found, scores = tv.evaluate_many(
        model, episodes, variants, observe=tv.Observe(hook, [2, 0]), max_tokens=max_tokens
    )
    expected = tv.collect(model, episodes, hook=hook, layers=[2, 0])
    torch.testing.assert_close(found.values, expected.values, atol=1e-4, rtol=1e-4)
    assert found.source == expected.source and found.layers == (2, 0)
    assert found.tasks == expected.tasks and torch.equal(found.labels, expected.labels)
    for one, other in zip(scores, tv.evaluate_many(model, episodes, variants), strict=True):
        torch.testing.assert_close(one.loss, other.loss, atol=1e-3, rtol=1e-4)
    assert all(not point.has_hooks() for point in model.hook_dict.values())


@pytest.mark.parametrize("kind", ["mamba", "gemma2"])
def test_models_that_do_not_pack_are_observed_too(kind: str, tokenizer: Any) -> None:
    model = zoo.bridge(kind, tokenizer, **({"sliding_window": 8} if kind == "gemma2" else {}))
    episodes = tv.sample_episodes(tv.find_tasks(["en_fr", "upper_case"]), 3, 2, seed=0)
    vectors = tv.task_vectors(tv.collect(model, episodes))
    for variants in ([[]], [[], vectors.inject("en_fr", 1)], [vectors.inject("en_fr", 1)]):
        found, scores = tv.evaluate_many(model, episodes, variants, observe=tv.Observe())
        torch.testing.assert_close(
            found.values, tv.collect(model, episodes).values, atol=1e-4, rtol=1e-4
        )
        assert len(scores) == len(variants)


def test_models_of_the_lab_are_observed_too() -> None:
    model = lab.shipped_run().model()
    episodes = lab.problem_episodes(lab.SparseLinearMixture.small(), n=3, n_shots=4)
    vectors = tv.task_vectors(tv.collect(model, episodes))
    found, scores = tv.evaluate_many(
        model, episodes, lambda task: [vectors.inject(task, 2)], observe=tv.Observe("z")
    )
    assert torch.equal(found.values, tv.collect(model, episodes, hook="z").values)
    [alone] = tv.evaluate_many(model, episodes, lambda task: [vectors.inject(task, 2)])
    assert torch.equal(scores[0].loss, alone.loss)


@pytest.mark.model
def test_variants_may_depend_on_the_task(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    mixed = [*episodes[::2], *episodes[1::2]]
    plain, own = tv.evaluate_many(model, mixed, lambda task: [[], vectors.inject(task, 1)])
    for row, episode in enumerate(mixed):
        alone = tv.evaluate(model, [episode], vectors.inject(episode.task, 1))
        assert float(own.loss[row]) == pytest.approx(float(alone.loss[0]), abs=1e-3)
    torch.testing.assert_close(plain.loss, tv.evaluate(model, mixed).loss, atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match=r"variants gives \[1, 2\] variants"):
        tv.evaluate_many(model, mixed, lambda task: [[]] * (1 + (task == "en_fr")))
    with pytest.raises(ValueError, match="no hook point"):
        tv.evaluate_many(model, mixed, [[]], observe=tv.Observe("nothing"))
