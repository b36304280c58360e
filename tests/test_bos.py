"""A beginning-of-sequence token stands where the template says, or where the tokenizer puts one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from transformers import AutoTokenizer

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.models.tokens import bos_habit, encode, encode_prompts, puts_bos

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_CHATML = CHATML.replace("<|im_start|>system\nYou help.<|im_end|>\n", "")
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def smollm2_tokenizer(model: Any, **kwargs: Any) -> Any:
    return AutoTokenizer.from_pretrained(model.tokenizer.name_or_path, **kwargs)


@pytest.mark.model
def test_the_habit_is_that_of_the_tokenizer_before_transformer_lens_changed_it(
    smollm2: Any,
) -> None:
    changed, original = smollm2.tokenizer, smollm2_tokenizer(smollm2)
    assert changed("a")["input_ids"] == [1, 81] and original("a")["input_ids"] == [81]
    assert bos_habit(smollm2) is False
    assert encode(smollm2, ["a"]) == [[81]]
    assert encode(smollm2, ["a"], bos=True) == [[1, 81]]


@pytest.mark.model
def test_a_tokenizer_that_puts_a_bos_keeps_its_habit(smollm2: Any) -> None:
    tokenizer = smollm2_tokenizer(smollm2, add_bos_token=True)
    assert puts_bos(tokenizer)
    model = tv.bridge_from_hf(zoo.hf_model("llama"), tokenizer, device="cpu")
    assert bos_habit(model) is True
    episodes = tv.sample_episodes(tv.find_tasks(["en_fr", "upper_case"]), 2, 1, seed=0)
    by_habit, asked = tv.collect(model, episodes), tv.collect(model, zoo.with_bos(episodes, True))
    without = tv.collect(model, zoo.with_bos(episodes, False))
    assert by_habit.source.bos is asked.source.bos is True and without.source.bos is False
    assert torch.equal(by_habit.values, asked.values)
    assert not torch.allclose(by_habit.values, without.values)
    scores = tv.evaluate(model, episodes)
    assert scores.bos is True
    assert torch.equal(scores.loss, tv.evaluate(model, zoo.with_bos(episodes, True)).loss)
    said = tv.generate(model, episodes[:1], max_new_tokens=3)
    assert said == tv.generate(model, [episodes[0].prompt], max_new_tokens=3)
    vectors = tv.task_vectors(by_habit)
    shuffled = tv.control_vectors(vectors, model, episodes, kinds=["reinitialised"])
    assert shuffled["reinitialised"].source.bos is True


def test_a_habit_that_cannot_be_known_is_asked_for(smollm2: Any) -> None:
    model = zoo.bridge("llama", smollm2.tokenizer)
    tokenizer = smollm2_tokenizer(smollm2, add_bos_token=True)
    tokenizer.name_or_path = "nobody/nothing"
    model.tokenizer = tokenizer
    episodes = tv.sample_episodes(tv.find_tasks(["en_fr"]), 1, 1, seed=0)
    with pytest.raises(ValueError, match=r"unknown whether.*PromptTemplate\(\.\.\., bos=True\)"):
        tv.evaluate(model, episodes)
    assert tv.evaluate(model, zoo.with_bos(episodes, False)).bos is False


def test_episodes_agree_in_their_use_of_a_bos(smollm2: Any) -> None:
    episodes = tv.sample_episodes(tv.find_tasks(["en_fr"]), 2, 1, seed=0)
    mixed = [*zoo.with_bos(episodes[:1], True), *zoo.with_bos(episodes[1:], False)]
    with pytest.raises(ValueError, match="give all episodes the same one"):
        tv.collect(smollm2, mixed)
    agreed = [*episodes[:1], *zoo.with_bos(episodes[1:], False)]  # None is False on SmolLM2
    assert encode_prompts(smollm2, agreed)[1] is False


@pytest.mark.parametrize("jinja", [CHATML, PLAIN_CHATML, GEMMA, MISTRAL])
def test_a_chat_template_writes_what_the_tokenizer_writes(smollm2: Any, jinja: str) -> None:
    tokenizer = smollm2.tokenizer
    template = tv.PromptTemplate.chat(tokenizer, chat_template=jinja)
    demos = (tv.Example("cat", "cats"), tv.Example("cow", "cows"))
    episode = tv.Episode("plural", demos, tv.Example("dog", "dogs"), template)
    turns = [
        {"role": role, "content": text}
        for demo in demos
        for role, text in (("user", demo.x), ("assistant", demo.y))
    ]
    turns.append({"role": "user", "content": "dog"})
    expected = tokenizer.apply_chat_template(
        turns, chat_template=jinja, add_generation_prompt=True, return_dict=False
    )
    [ids], _ = encode_prompts(smollm2, [episode])
    assert ids == expected
    assert ids.count(tokenizer.bos_token_id) == expected.count(tokenizer.bos_token_id)
    assert episode.answer.strip() == "dogs"
    whole = tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": "dogs"}], chat_template=jinja, tokenize=False
    )
    bos = tokenizer.bos_token if template.bos else ""
    assert bos + episode.prompt + episode.answer + episode.separator == whole


def test_an_instruction_stands_in_the_first_turn_of_a_chat(smollm2: Any) -> None:
    template = tv.PromptTemplate.chat(smollm2.tokenizer, chat_template=GEMMA)
    told = replace(template, instruction="Give the plural of {task}.")
    demos = [tv.Example("cat", "cats")]
    assert told.render(demos, "dog", "it") == (
        "<turn>user\nGive the plural of it.\n\ncat</turn>\n<turn>model\ncats</turn>\n"
        "<turn>user\ndog</turn>\n<turn>model\n"
    )


def test_a_chat_template_that_cannot_be_taken_apart_is_refused(smollm2: Any) -> None:
    with pytest.raises(ValueError, match="has no chat template; give one"):
        tv.PromptTemplate.chat(tv.lab.toy_tokenizer())
    numbered = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match="does not format every exchange the same way"):
        tv.PromptTemplate.chat(smollm2.tokenizer, chat_template=numbered)
    with pytest.raises(ValueError, match="repeats or omits a turn"):
        tv.PromptTemplate.chat(smollm2.tokenizer, chat_template="{{ messages[0].content }}")


@pytest.mark.model
def test_a_prompt_may_begin_with_the_token_that_pads(model: Any) -> None:
    reference = zoo.hf_model("llama")
    pad, template = model.tokenizer.pad_token, tv.PromptTemplate("{x}{y}", separator="", bos=False)
    for text in (f"{pad}one two", pad + pad, f"{pad} a{pad}"):
        episode = tv.Episode("copy", (), tv.Example(text, " three"), template)
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        answer = model.tokenizer.encode(" three", add_special_tokens=False)
        with torch.no_grad():
            out = reference(torch.tensor([ids + answer]), output_hidden_states=True)
        logits = out.logits[0, len(ids) - 1 : -1].log_softmax(-1)
        expected = -logits[range(len(answer)), answer].sum()
        torch.testing.assert_close(tv.evaluate(model, [episode]).loss[0], expected)
        collected = tv.collect(model, [episode], layers=[1]).values[0, 0]
        torch.testing.assert_close(
            collected, out.hidden_states[2][0, len(ids) - 1], atol=1e-4, rtol=1e-4
        )
        first = model.tokenizer.decode(
            int(out.logits[0, len(ids) - 1].argmax()), skip_special_tokens=True
        )
        assert tv.generate(model, [episode], max_new_tokens=1, use_cache=False) == [first]
