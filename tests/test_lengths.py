"""Prompts beyond what a model can run, or can run together with others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.models.limits import limits


def repeated(words: int, answer: str = "x") -> tv.Episode:
    template = tv.PromptTemplate(example="{x}{y}", separator="")
    return tv.Episode("copy", (), tv.Example(" a" * words, answer), template)


@pytest.mark.model
def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(tokenizer: Any) -> None:
    model = zoo.bridge("gpt2", tokenizer, n_positions=16)
    for call in (
        lambda: tv.evaluate(model, [repeated(17)]),
        lambda: tv.collect(model, [repeated(17)]),
        lambda: tv.generate(model, [repeated(10)], max_new_tokens=8),
        lambda: tv.analysis.input_embeddings(model, [repeated(17)]),
    ):
        with pytest.raises(ValueError, match=r"a prompt of 1[07] tokens.* into 16 tokens"):
            call()
    with pytest.raises(ValueError, match="an answer of 3"):
        tv.evaluate(model, [repeated(15, " a a a")])


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
def test_answers_up_to_the_end_of_the_context_are_scored(tokenizer: Any) -> None:
    model = zoo.bridge("gpt2", tokenizer, n_positions=16)
    episodes = [repeated(16), repeated(14, " a a a"), repeated(3, " a a")]
    variants = [[], [tv.ablate(1)], [tv.ablate(0, hook="mlp_out")]]
    together = tv.evaluate_many(model, episodes, variants)
    for row, episode in enumerate(episodes):
        alone = tv.evaluate_many(model, [episode], variants)
        for one, many in zip(alone, together, strict=True):
            torch.testing.assert_close(one.loss[0], many.loss[row], atol=1e-4, rtol=1e-4)


def test_rotary_positions_run_beyond_the_length_they_were_made_for(tokenizer: Any) -> None:
    model = zoo.bridge("llama", tokenizer, max_position_embeddings=16)
    assert limits(model).context is None
    assert tv.evaluate(model, [repeated(20)]).loss.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
@pytest.mark.parametrize("kind", ["gpt2", "opt", "mamba", "gemma2"])
def test_the_unedited_model_alone_is_evaluated_and_observed(
    tokenizer: Any, episodes: list[tv.Episode], kind: str
) -> None:
    changes = {"sliding_window": 8} if kind == "gemma2" else {}
    model = zoo.bridge(kind, tokenizer, **changes)
    hooks = ["resid_post"] if kind == "mamba" else ["resid_post", "z", "q", "k", "v", "post"]
    for hook in hooks:
        values, (scores,) = tv.evaluate_many(model, episodes, [[]], observe=tv.Observe(hook))
        expected = tv.collect(model, episodes, hook=hook).values
        torch.testing.assert_close(values.values, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scores.loss, tv.evaluate(model, episodes).loss)


def rope(kind: str) -> dict[str, Any]:
    return {"rope_type": kind, "original_max_position_embeddings": 9}


@pytest.mark.parametrize(
    ("names", "limit"),
    [
        ({"sliding_window": 9}, (9, None)),
        ({"sliding_window": 9, "layer_types": ["full_attention"]}, (None, None)),
        ({"window_size": 9, "attention_layers": ["global", "local"]}, (9, 9)),
        ({"window_size": 9, "attention_layers": ["global"]}, (None, None)),
        ({"attention_chunk_size": 9}, (9, None)),
        ({"floor_scale": 9}, (8, 8)),
        ({"index_topk": 9}, (9, 9)),
        ({"block_local_window": 9}, (9, 9)),  # of nobody yet
        ({"num_local_experts": 9, "chunk_size_feed_forward": 9}, (None, None)),
        ({"max_window_layers": 9}, (None, None)),
        ({"rope_parameters": rope("longrope")}, (9, None)),
        ({"rope_parameters": {"full_attention": rope("longrope")}}, (9, None)),
        ({"rope_parameters": rope("yarn")}, (None, None)),
    ],
)
def test_lengths_are_read_from_the_configuration(
    tokenizer: Any, names: dict[str, Any], limit: tuple[Any, Any]
) -> None:
    model = zoo.bridge("llama", tokenizer)
    for name, value in names.items():
        setattr(model.original_model.config, name, value)
    found = limits(model)
    assert (found.apart, found.indexed) == limit


def test_a_rotary_embedding_that_remembers_the_longest_prompt_is_refused(tokenizer: Any) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = zoo.bridge("llama", tokenizer, max_position_embeddings=16, rope_parameters=rope)
    with pytest.raises(ValueError, match=r"20 tokens does not fit into 15 tokens.*dynamic rotary"):
        tv.collect(model, [repeated(3), repeated(20)])
    short = tv.evaluate(model, [repeated(3)]).loss
    with torch.no_grad():
        model(torch.full((1, 40), 7))
    torch.testing.assert_close(tv.evaluate(model, [repeated(3)]).loss, short)
