from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.models.capabilities import capabilities

PROMPTS = ["example:cat->cats\nexample:dog->", "one two three", "a"]


def by_hand(model: Any, prompt: str, n_new: int, hooks_at: Any) -> str:
    """Greedy continuation of one unpadded prompt, whole sequences, hooks given by position."""
    tokens = model.tokenizer.encode(prompt, add_special_tokens=False)
    n_prompt = len(tokens)
    for _ in range(n_new):
        with torch.no_grad():
            logits = model.run_with_hooks(
                torch.tensor([tokens]), fwd_hooks=hooks_at(n_prompt, len(tokens))
            )
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == model.tokenizer.eos_token_id:
            tokens.pop()
            break
    return str(model.tokenizer.decode(tokens[n_prompt:], skip_special_tokens=True))


@pytest.mark.model
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("first", [0, 2, None])
def test_injection_acts_on_the_prompt_alone_unless_asked_otherwise(
    model: Any, vectors: tv.TaskVectors, use_cache: bool, first: int | None
) -> None:
    intervention = tv.inject(vectors["en_fr", 1], 1, mode="add", scale=2.0)

    def hooks_at(n_prompt: int, n_now: int) -> list[Any]:
        end = n_now if first is None else min(n_now, n_prompt + first)
        at = list(range(n_prompt - 1, end))

        def edit(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            edited = activation.clone()
            edited[:, at] += 2 * intervention.vector
            return edited

        return [(intervention.name, edit)]

    texts = tv.generate(
        model,
        PROMPTS,
        [intervention],
        max_new_tokens=6,
        first=first,
        use_cache=use_cache,
    )
    assert texts == [by_hand(model, prompt, 6, hooks_at) for prompt in PROMPTS]


@pytest.mark.model
@pytest.mark.parametrize("use_cache", [True, False])
def test_an_intervention_everywhere_covers_the_whole_prompt(
    model: Any, vectors: tv.TaskVectors, use_cache: bool
) -> None:
    intervention = tv.inject(vectors["en_fr", 1], 1, mode="add", position=None)

    def hooks_at(n_prompt: int, n_now: int) -> list[Any]:
        def edit(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            edited = activation.clone()
            edited[:, :n_prompt] += intervention.vector
            return edited

        return [(intervention.name, edit)]

    texts = tv.generate(model, PROMPTS, [intervention], max_new_tokens=5, use_cache=use_cache)
    assert texts == [by_hand(model, prompt, 5, hooks_at) for prompt in PROMPTS]


@pytest.mark.model
def test_continuations_end_before_the_stop_text(model: Any) -> None:
    whole = tv.generate(model, PROMPTS[:1], max_new_tokens=8)[0]
    stop = whole[len(whole) // 2]
    cut = tv.generate(model, PROMPTS[:1], max_new_tokens=8, stop=stop)[0]
    assert cut == whole[: whole.index(stop)]


@pytest.mark.model
def test_sampling_is_a_function_of_its_seed(model: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0}
    state = torch.random.get_rng_state()
    one = tv.generate(model, PROMPTS, seed=1, **options)
    assert tv.generate(model, PROMPTS, seed=1, **options) == one
    assert tv.generate(model, PROMPTS, seed=2, **options) != one
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_recurrent_model_generates_without_a_cache(tokenizer: Any) -> None:
    mamba = zoo.bridge("mamba", tokenizer)
    texts = tv.generate(mamba, PROMPTS, max_new_tokens=4)
    assert texts == [by_hand(mamba, prompt, 4, lambda *_: []) for prompt in PROMPTS]
    assert not capabilities(mamba).caches
    with pytest.raises(ValueError, match="cannot be cached"):
        tv.generate(mamba, PROMPTS, max_new_tokens=4, use_cache=True)


def test_an_injected_vector_turns_a_zero_shot_prompt_into_the_task(smollm2: Any) -> None:
    tasks = tv.find_tasks(["next_letter"])
    sets = tv.sample_splits(tasks, {"train": 20, "test": 6}, n_shots=8, seed=0)
    vectors = tv.task_vectors(tv.collect(smollm2, sets["train"], layers=[20]))
    queries = tv.zero_shot(sets["test"])
    texts = tv.generate(
        smollm2,
        [episode.prompt for episode in queries],
        [tv.inject(vectors["next_letter", 20], 20)],
        max_new_tokens=1,
    )
    right = [text == episode.answer for text, episode in zip(texts, queries, strict=True)]
    assert sum(right) >= 4


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts must be a list"),
        ("text", {}, "prompts must be a list"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (["a"], {"temperature": -1.0}, "temperature -1"),
        ([""], {}, "has no tokens"),
    ],
)
def test_requests_out_of_range_are_refused(
    model: Any, prompts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tv.generate(model, prompts, **{"max_new_tokens": 2, **options})


def test_a_continuation_keeps_the_space_that_it_begins_with() -> None:
    tokenizer = zoo.sentencepiece_tokenizer()
    hf_model = zoo.hf_model("llama", vocab_size=len(tokenizer), num_hidden_layers=1)
    model = tv.bridge_from_hf(hf_model, tokenizer, device="cpu")
    space_cat = tokenizer.convert_tokens_to_ids(chr(0x2581) + "cat")
    hf_model.lm_head.register_forward_hook(  # the model says nothing else
        lambda module, args, logits: logits.index_fill(-1, torch.tensor(space_cat), 1e9)
    )
    texts = tv.generate(model, ["dog", "dog->"], max_new_tokens=2, stop="?")
    assert texts == [" cat cat", " cat cat"]


@pytest.mark.model
@pytest.mark.usefixtures("unchecked")
def test_interventions_of_a_generator_act_in_generation(
    model: Any, vectors: tv.TaskVectors
) -> None:
    edits = [tv.inject(vectors["en_fr", 1], 1, mode="add", scale=8.0), tv.ablate(0)]
    expected = tv.generate(model, PROMPTS, edits, max_new_tokens=4)
    assert tv.generate(model, PROMPTS, (edit for edit in edits), max_new_tokens=4) == expected
    assert tv.generate(model, PROMPTS, max_new_tokens=4) != expected
