"""What generation returns and how it chooses, against transformers' own ``generate``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.interventions.generated import Continuations
from transformer_lens_taskvec.models.decoding import decoding_of, seed_of

PROMPTS = ["example:cat->cats\nexample:dog->", "one two three", "a"]


@pytest.fixture(scope="module")
def bridge(tokenizer: Any) -> Any:
    return zoo.bridge("llama", tokenizer)


def ids_of(model: Any, prompt: str) -> list[int]:
    return list(model.tokenizer.encode(prompt, add_special_tokens=False))


def by_transformers(model: Any, prompt: str, config: GenerationConfig, **options: Any) -> list[int]:
    """New tokens of one unpadded prompt, from the Hugging Face model itself."""
    tokens = torch.tensor([ids_of(model, prompt)])
    kept = model.original_model.generation_config
    model.original_model.generation_config = GenerationConfig()
    try:
        with torch.no_grad():
            found = model.original_model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=GenerationConfig(
                    **{"pad_token_id": 2, "eos_token_id": 2, **config.to_diff_dict()}
                ),
                **options,
            )
    finally:
        model.original_model.generation_config = kept
    return list(found[0, tokens.shape[1] :].tolist())


GREEDY = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(0, 49152, 2))},
    {"min_new_tokens": 6},
    {"bad_words_ids": [[5], [7, 8]]},
]


@pytest.mark.parametrize("settings", GREEDY)
def test_greedy_tokens_are_those_of_transformers(bridge: Any, settings: dict[str, Any]) -> None:
    config = GenerationConfig(max_new_tokens=8, do_sample=False, **settings)
    found = tv.generate(bridge, PROMPTS, config=config, scores=True)
    assert isinstance(found, Continuations)
    assert [list(ids) for ids in found.tokens] == [
        by_transformers(bridge, prompt, config) for prompt in PROMPTS
    ]
    plain = tv.generate(bridge, PROMPTS, max_new_tokens=8)
    if settings.keys() & {"repetition_penalty", "no_repeat_ngram_size", "suppress_tokens"}:
        assert list(found.texts) != plain


SAMPLED = [
    {"top_k": 0},
    {"top_k": 5, "temperature": 2.0},
    {"top_k": 0, "top_p": 0.6, "temperature": 0.5},
    {"top_k": 0, "min_p": 0.2},
    {"top_k": 0, "top_p": 0.9, "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("settings", SAMPLED)
def test_sampled_tokens_are_those_of_transformers_under_the_same_seed(
    bridge: Any, settings: dict[str, Any]
) -> None:
    config = GenerationConfig(max_new_tokens=8, do_sample=True, **settings)
    found = tv.generate(bridge, [*PROMPTS, "a"], config=config, seed=3, scores=True)
    assert isinstance(found, Continuations)
    for row, (prompt, number) in enumerate(zip([*PROMPTS, "a"], (0, 0, 0, 1), strict=True)):
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(3, ids_of(bridge, prompt), number))
            assert list(found.tokens[row]) == by_transformers(bridge, prompt, config)
    assert found.tokens[2] != found.tokens[3]


@pytest.mark.model
def test_a_sample_does_not_depend_on_the_other_prompts(model: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 5}
    together = tv.generate(model, PROMPTS, **options)
    assert together == [tv.generate(model, [one], **options)[0] for one in PROMPTS]
    assert tv.generate(model, PROMPTS[::-1], **options) == together[::-1]
    twice = tv.generate(model, [PROMPTS[0], PROMPTS[0]], **options)
    assert twice[0] == together[0] != twice[1]


@pytest.mark.model
@pytest.mark.parametrize("use_cache", [True, False])
def test_activations_are_those_of_a_pass_over_prompt_and_continuation(
    model: Any, vectors: tv.TaskVectors, use_cache: bool
) -> None:
    edit = tv.inject(vectors["en_fr", 1], 1, mode="add", scale=2.0)
    name = "blocks.{}.hook_resid_post"
    observe = tv.Observe(layers=[2, 1])
    found = tv.generate(
        model, PROMPTS, [edit], max_new_tokens=4, observe=observe, use_cache=use_cache
    )
    assert isinstance(found, Continuations)
    assert found.activations is not None and found.layers == (2, 1) and found.scores is None
    for row, prompt in enumerate(PROMPTS):
        before = ids_of(model, prompt)

        def add(activation: torch.Tensor, hook: Any, at: int = len(before) - 1) -> torch.Tensor:
            edited = activation.clone()
            edited[:, at] += 2 * edit.vector
            return edited

        tokens = torch.tensor([[*before, *found.tokens[row]]])
        with torch.no_grad(), model.hooks(fwd_hooks=[(edit.name, add)]):
            logits, cache = model.run_with_cache(tokens)
        start = len(before) - 1
        expected = torch.stack([cache[name.format(layer)][0, start:] for layer in (2, 1)], dim=1)
        torch.testing.assert_close(found.activations[row], expected, atol=1e-4, rtol=1e-4)
        own = logits[0, start:-1].log_softmax(-1)
        own = own.gather(1, tokens[0, start + 1 :, None])[:, 0]
        torch.testing.assert_close(found.logprobs[row], own, atol=1e-4, rtol=1e-4)
    frame = found.to_frame()
    assert list(frame.continuation) == list(found.texts) and list(frame.n_tokens) == [4, 4, 4]


def test_activations_end_where_the_continuation_does(bridge: Any) -> None:
    whole = tv.generate(bridge, PROMPTS, max_new_tokens=5, scores=True)
    assert isinstance(whole, Continuations)
    ends = [whole.tokens[0][1], whole.tokens[1][3]]
    config = GenerationConfig(eos_token_id=ends, max_new_tokens=5)
    cut = tv.generate(bridge, PROMPTS, config=config, observe=tv.Observe("attn_out"), scores=True)
    assert isinstance(cut, Continuations) and cut.activations is not None
    assert cut.scores is not None and whole.scores is not None
    for row, ids in enumerate(whole.tokens):
        places = [place for place, one in enumerate(ids) if one in ends]
        n = places[0] + 1 if places else len(ids)
        assert cut.tokens[row] == ids[:n]
        assert cut.activations[row].shape == (1 + n, 3, 32)
        assert torch.isfinite(cut.activations[row]).all()
        torch.testing.assert_close(cut.scores[row], whole.scores[row][:n])
        before = bridge.tokenizer.decode(ids[: n - 1] if places else ids)
        assert cut.texts[row] == before


def test_scores_are_those_of_transformers(bridge: Any) -> None:
    config = GenerationConfig(max_new_tokens=4, repetition_penalty=1.4)
    found = tv.generate(bridge, PROMPTS, config=config, scores=True)
    assert isinstance(found, Continuations) and found.scores is not None
    tokens = torch.tensor([ids_of(bridge, PROMPTS[0])])
    expected = bridge.original_model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=4,
        repetition_penalty=1.4,
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=-1,
    )
    torch.testing.assert_close(
        found.scores[0], torch.cat(expected.scores), atol=1e-4, rtol=1e-4, check_dtype=False
    )


def hook_at(name: str, vector: torch.Tensor, n_prompt: int, use_cache: bool) -> tuple[str, Any]:
    """Adds at the last token of an unpadded prompt, in every pass that covers it."""
    passes: list[int] = []

    def add(activation: torch.Tensor, hook: Any = None) -> torch.Tensor:
        passes.append(len(activation))
        if use_cache and len(passes) > 1:
            return activation
        edited = activation.clone()
        edited[:, n_prompt - 1] += vector
        return edited

    return name, add


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_are_those_of_transformers_under_the_same_hooks(bridge: Any, use_cache: bool) -> None:
    config = GenerationConfig(num_beams=3, max_new_tokens=5, length_penalty=0.5)
    vector = torch.linspace(-1, 1, 32)
    edit = tv.inject(vector, 1, mode="add", scale=4.0)
    found = tv.generate(bridge, PROMPTS, [edit], config=config, use_cache=use_cache)
    expected = []
    for prompt in PROMPTS:
        n_prompt = len(ids_of(bridge, prompt))
        with bridge.hooks(fwd_hooks=[hook_at(edit.name, 4 * vector, n_prompt, use_cache)]):
            new = by_transformers(bridge, prompt, config, use_cache=use_cache)
        expected.append(bridge.tokenizer.decode(new, skip_special_tokens=True))
    assert found == expected
    assert found != tv.generate(bridge, PROMPTS, config=config)
    greedy = tv.generate(bridge, PROMPTS, [edit], max_new_tokens=5)
    assert found != greedy
    stop = greedy[0][2:4]
    ended = GenerationConfig(**config.to_diff_dict(), stop_strings=[stop])
    [cut] = tv.generate(bridge, PROMPTS[:1], config=config, stop=stop)
    new = by_transformers(bridge, PROMPTS[0], ended, tokenizer=bridge.tokenizer)
    assert cut == bridge.tokenizer.decode(new, skip_special_tokens=True).partition(stop)[0]
    assert all(not point.has_hooks() for point in bridge.hook_dict.values())
    assert not bridge.original_model._forward_pre_hooks


class Bare:
    """A model without the Hugging Face model that it came from."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        if name == "original_model":
            raise AttributeError(name)
        return getattr(self._model, name)


@pytest.mark.model
def test_beams_are_refused_where_there_is_no_hugging_face_model(model: Any) -> None:
    config = GenerationConfig(num_beams=2, max_new_tokens=2)
    bare = Bare(model) if hasattr(model, "original_model") else model
    with pytest.raises(ValueError, match="beams are searched by the Hugging Face model"):
        tv.generate(bare, ["a"], config=config)


class AfterThree(StoppingCriteria):
    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.tensor([input_ids.shape[1] >= 3])


@pytest.mark.model
def test_several_conditions_stop_a_continuation_at_the_first(model: Any) -> None:
    whole = tv.generate(model, PROMPTS, max_new_tokens=8)
    stops = [whole[0][3:5], whole[1][6:8]]
    cut = tv.generate(model, PROMPTS, max_new_tokens=8, stop=stops)
    for text, own in zip(whole, cut, strict=True):
        assert own == text[: min([text.index(stop) for stop in stops if stop in text] or [999])]
    config = GenerationConfig(stop_strings=stops, max_new_tokens=8)
    assert tv.generate(model, PROMPTS, config=config) == cut
    short = tv.generate(model, PROMPTS, max_new_tokens=8, stop=AfterThree(), scores=True)
    assert isinstance(short, Continuations)
    assert list(map(len, short.tokens)) == [1, 1, 2]  # "a" is one token


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


def test_a_streamer_hears_what_it_hears_of_transformers(bridge: Any) -> None:
    ours, theirs = Heard(), Heard()
    config = GenerationConfig(max_new_tokens=4)
    tv.generate(bridge, PROMPTS[:1], config=config, streamer=ours)
    by_transformers(bridge, PROMPTS[0], config, streamer=theirs)
    assert ours.heard == theirs.heard and ours.heard[-1] == "end" and len(ours.heard) == 6


def test_a_template_turns_texts_into_turns_of_a_chat(smollm2: Any) -> None:
    template = tv.PromptTemplate.chat(smollm2.tokenizer)
    text = "What is the capital of France?"
    found = tv.generate(smollm2, [text], max_new_tokens=8, template=template, scores=True)
    assert isinstance(found, Continuations)
    turns = [{"role": "user", "content": text}]
    asked = smollm2.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    own = asked.removeprefix(smollm2.tokenizer.bos_token)
    assert found.prompts == (own,) and "Paris" in found.texts[0]
    assert "Paris" in tv.generate(smollm2, [asked], max_new_tokens=8)[0]


REFUSED = [
    ({"top_p": 0.9}, {}, "top_p=0.9, which acts in sampling only"),
    (
        {"num_return_sequences": 2, "num_beams": 2},
        {},
        "num_return_sequences=2, which",
    ),
    (
        {"max_length": 30},
        {},
        "max_length=30, which generate does not take; it takes:.* max_new_tokens",
    ),
    ({"output_scores": True}, {}, "output_scores=True"),
    ({"penalty_alpha": 0.6}, {}, "penalty_alpha=0.6"),
    ({"num_beams": 2, "do_sample": True}, {}, "num_beams=2 and do_sample=True"),
    ({"length_penalty": 0.5}, {}, "acts on beams only"),
    ({"max_new_tokens": 3}, {"max_new_tokens": 4}, "give it in one place"),
    ({}, {}, "give it in one place"),
    ({"do_sample": True}, {"temperature": 1.0}, "config and temperature=1.0"),
    ({"num_beams": 2}, {"observe": tv.Observe(), "max_new_tokens": 2}, "beams keep several"),
    ({}, {"max_new_tokens": 2, "streamer": Heard(), "prompts": ["a", "b"]}, "stream from one"),
    ({}, {"max_new_tokens": 2, "stop": ["a", ""]}, "empty text"),
    ({}, {"max_new_tokens": 2, "observe": tv.Observe(layers=[9])}, "layer 9 is out of range"),
]


@pytest.mark.parametrize(("settings", "options", "message"), REFUSED)
def test_what_would_not_act_is_refused(
    bridge: Any, settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    config = GenerationConfig(**settings) if settings else None
    options = {"prompts": ["a"], **options}
    with pytest.raises(ValueError, match=message):
        tv.generate(bridge, config=config, **options)


def test_a_models_own_config_is_taken(bridge: Any) -> None:
    own = GenerationConfig.from_model_config(bridge.original_model.config)
    own.max_new_tokens = 4
    assert tv.generate(bridge, PROMPTS, config=own) == tv.generate(
        bridge, PROMPTS, max_new_tokens=4
    )
    assert decoding_of(bridge, own).ends == (2,)


def test_episodes_keep_their_own_templates(bridge: Any, episodes: list[tv.Episode]) -> None:
    with pytest.raises(ValueError, match="episodes have templates"):
        tv.generate(bridge, episodes, max_new_tokens=2, template=tv.ARROW)
