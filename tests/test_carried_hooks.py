"""Hooks that are on a model before the library is called, and several threads on one model."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch.nn.modules.module import register_module_forward_hook

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.protocol import inference

MINE = "hooks of yours"


def add_at_the_end(vector: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A hook as anybody writes it: it edits the last position of what runs."""

    def hook_function(activation: torch.Tensor, hook: Any = None) -> torch.Tensor:
        edited = activation.clone()
        edited[:, -1] += vector
        return edited

    return hook_function


def nll_token_by_token(model: Any, episode: tv.Episode) -> tuple[torch.Tensor, bool]:
    """NLL and exact match of an answer in one plain pass a token, whatever hooks the model has."""
    ids = model.tokenizer.encode(episode.prompt, add_special_tokens=False)
    nll, right = torch.zeros(()), True
    for token in model.tokenizer.encode(episode.answer, add_special_tokens=False):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        nll = nll - logits.log_softmax(-1)[token]
        right = right and int(logits.argmax()) == token
        ids = [*ids, token]
    return nll, right


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
def test_interventions_on_the_model_act_as_if_they_were_given(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    edit, other = tv.inject(vectors["en_fr", 1], 1), tv.ablate(2, hook="mlp_out")
    before = {name: list(point._forward_hooks) for name, point in model.hook_dict.items()}
    given = tv.evaluate_many(model, episodes, [[edit], [edit, other]])
    texts = tv.generate(model, episodes, [edit], max_new_tokens=3)
    with model.hooks(fwd_hooks=[edit]):
        carried = tv.evaluate_many(model, episodes, [[], [other]])
        assert tv.generate(model, episodes, max_new_tokens=3) == texts
        with torch.no_grad():  # and they are there again
            assert list(model.hook_dict[edit.name]._forward_hooks)
    for one, same in zip(carried, given, strict=True):
        torch.testing.assert_close(one.loss, same.loss, atol=1e-5, rtol=1e-5)
        assert torch.equal(one.correct, same.correct)
    then = tv.inject(vectors["upper_case", 1], 1, mode="add")
    orders = [[edit, then], [then, edit]]
    given = tv.evaluate_many(model, episodes, orders)
    for order, expected in zip(orders, given, strict=True):
        with model.hooks(fwd_hooks=order):
            torch.testing.assert_close(tv.evaluate(model, episodes).loss, expected.loss)
    assert not torch.allclose(given[0].loss, given[1].loss, atol=1e-3)
    after = {name: list(point._forward_hooks) for name, point in model.hook_dict.items()}
    assert after == before


@pytest.mark.model
def test_interventions_on_the_model_act_where_activations_are_collected(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    edit = tv.inject(vectors["en_fr", 1], 1)
    with model.hooks(fwd_hooks=[edit]), pytest.warns(UserWarning, match=MINE):
        values = tv.collect(model, episodes).at(1)
    torch.testing.assert_close(values, vectors["en_fr", 1].expand_as(values))


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
@pytest.mark.parametrize("permanent", [False, True])
def test_a_hook_at_the_last_position_acts_on_every_token_that_is_predicted(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors, permanent: bool
) -> None:
    vector = 2 * vectors["en_fr", 1]
    name = "blocks.1.hook_resid_post"
    model.add_hook(name, add_at_the_end(vector), is_permanent=permanent)
    try:
        with pytest.warns(UserWarning, match=MINE):
            variants = [[], [tv.ablate(2, hook="attn_out")]]
            scores, ablated = tv.evaluate_many(model, episodes, variants)
        expected = [nll_token_by_token(model, episode) for episode in episodes]
        with pytest.warns(UserWarning, match=MINE):
            texts = tv.generate(model, episodes, max_new_tokens=2)
        for episode, text in zip(episodes[:3], texts, strict=False):
            ids = model.tokenizer.encode(episode.prompt, add_special_tokens=False)
            for _ in range(2):
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            assert model.tokenizer.decode(ids[-2:], skip_special_tokens=True) == text
    finally:
        model.reset_hooks(including_permanent=True)
    torch.testing.assert_close(
        scores.loss, torch.stack([nll for nll, _ in expected]), atol=1e-4, rtol=1e-4
    )
    assert scores.correct.tolist() == [right for _, right in expected]
    assert not torch.allclose(scores.loss, tv.evaluate(model, episodes).loss, atol=1e-2)
    assert not torch.allclose(scores.loss, ablated.loss, atol=1e-3)


@pytest.mark.model
def test_a_hook_of_torch_counts_as_one_of_the_user(
    tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    model = zoo.bridge("llama", tokenizer)
    assert capabilities(model).packs
    block = model.original_model.model.layers[1]
    handle = block.mlp.register_forward_hook(lambda module, args, output: 0 * output)
    with pytest.warns(UserWarning, match=MINE):
        scores = tv.evaluate(model, episodes)
    expected = [nll_token_by_token(model, episode)[0] for episode in episodes]
    handle.remove()
    torch.testing.assert_close(scores.loss, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert capabilities(model).packs


def test_a_hook_on_all_modules_counts_as_one_of_the_user(
    tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    model = zoo.bridge("llama", tokenizer)
    point, edit = model.blocks[1].hook_out, add_at_the_end(torch.ones(32))
    handle = register_module_forward_hook(
        lambda module, args, output: edit(output) if module is point else None
    )
    try:
        with pytest.warns(UserWarning, match=MINE):
            scores = tv.evaluate_many(model, episodes, [[], []])[0]
        expected = [nll_token_by_token(model, episode)[0] for episode in episodes]
    finally:
        handle.remove()
    torch.testing.assert_close(scores.loss, torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.model
def test_an_intervention_at_another_hook_point_than_its_own_acts_there(
    model: Any, episodes: list[tv.Episode]
) -> None:
    edit = tv.inject(torch.ones(32), 0, mode="add")
    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", edit)]):
        with pytest.warns(UserWarning, match=MINE):
            scores = tv.evaluate_many(model, episodes, [[], []])[0]
        expected = [nll_token_by_token(model, episode)[0] for episode in episodes]
    torch.testing.assert_close(scores.loss, torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.model
def test_a_cache_of_the_user_holds_whole_prompts(model: Any, episodes: list[tv.Episode]) -> None:
    if not hasattr(model, "get_caching_hooks"):
        pytest.skip("the bridge of TransformerLens 3.x has none")
    cache, hooks, _ = model.get_caching_hooks()
    with model.hooks(fwd_hooks=hooks), pytest.warns(UserWarning, match=MINE):
        tv.evaluate_many(model, episodes[:1], [[], [tv.ablate(1)]])
    prompt = model.tokenizer.encode(episodes[0].prompt, add_special_tokens=False)
    answer = model.tokenizer.encode(episodes[0].answer, add_special_tokens=False)
    name = next(name for name in cache if name.endswith(("1.hook_resid_post", "1.hook_out")))
    assert cache[name].shape[1] == len(prompt) + len(answer) - 1


def test_a_hook_that_comes_after_an_intervention_is_refused(
    tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    model = zoo.bridge("llama", tokenizer)
    edit = tv.inject(torch.ones(32), 1)
    with (
        model.hooks(fwd_hooks=[edit, (edit.name, add_at_the_end(torch.ones(32)))]),
        pytest.raises(ValueError, match="comes after an intervention"),
    ):
        tv.evaluate(model, episodes)
    tv.evaluate(model, episodes)


def test_what_is_found_under_autocast_or_hooks_is_not_remembered(tokenizer: Any) -> None:
    model = zoo.bridge("llama", tokenizer)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", add_at_the_end(torch.ones(32)))]):
        assert not capabilities(model).packs
    assert capabilities(model).packs
    model = zoo.bridge("gpt2", tokenizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = capabilities(model)
        assert capabilities(model) is not first
    assert capabilities(model).packs
    assert capabilities(model) is capabilities(model)


@pytest.mark.model
def test_threads_take_turns_on_a_model(model: Any, episodes: list[tv.Episode]) -> None:
    edits = [tv.inject(torch.full((32,), float(size)), 1) for size in range(6)]
    alone = [tv.evaluate(model, episodes, [edit]).loss for edit in edits]
    found: dict[int, Any] = {}

    def work(index: int) -> None:
        try:
            losses = []
            for _ in range(3):
                tv.collect(model, episodes[:2])
                losses.append(tv.evaluate(model, episodes, [edits[index]]).loss)
            found[index] = losses
        except Exception as error:  # what the other thread did to this one
            found[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(edits))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        assert isinstance(found[index], list), found[index]
        for loss in found[index]:
            torch.testing.assert_close(loss, expected)
    assert not model.training


def test_bridges_around_one_model_take_turns(tokenizer: Any, episodes: list[tv.Episode]) -> None:
    hf_model = zoo.hf_model("llama")
    first, second = (tv.bridge_from_hf(hf_model, tokenizer, device="cpu") for _ in range(2))
    entered = threading.Event()

    def work() -> None:
        with inference(second):
            entered.set()

    thread = threading.Thread(target=work)
    with inference(first):
        thread.start()
        assert not entered.wait(0.2)
    thread.join()
    assert entered.is_set()


def test_collecting_takes_no_hook_of_another_thread_for_the_users(
    tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    model = zoo.bridge("llama", tokenizer)
    tv.collect(model, episodes[:1])  # tries its hook points
    started, values = threading.Event(), []
    thread = threading.Thread(target=lambda: values.append(tv.collect(model, episodes[:1])))

    def slow(activation: torch.Tensor, hook: Any = None) -> None:
        if not started.is_set():
            started.set()
            thread.start()
            thread.join(0.2)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tv.evaluate(model, episodes[:1], [("blocks.1.hook_resid_post", slow)])
        thread.join()
    assert len(values) == 1
