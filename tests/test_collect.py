from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.models.forward import run_until

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
}


def tokens_of(model: Any, episode: tv.Episode) -> torch.Tensor:
    return torch.tensor([model.tokenizer.encode(episode.prompt, add_special_tokens=False)])


@pytest.mark.model
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("position", [-1, 1])
def test_values_equal_those_of_run_with_cache_on_each_prompt_alone(
    model: Any, episodes: list[tv.Episode], hook: str, position: int
) -> None:
    found = tv.collect(model, episodes, hook=hook, layers=[2, 0], position=position, batch_size=4)
    assert found.layers == (2, 0)
    for row, episode in enumerate(episodes):
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens_of(model, episode))
        for column, layer in enumerate(found.layers):
            expected = cache[f"blocks.{layer}.{HOOKS[hook]}"][0, position]
            torch.testing.assert_close(found.values[row, column], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.model
def test_labels_and_tasks_follow_the_episodes(model: Any, episodes: list[tv.Episode]) -> None:
    found = tv.collect(model, episodes, layers=[1])
    assert [found.tasks[label] for label in found.labels] == [e.task for e in episodes]
    assert found.values.shape == (len(episodes), 1, 32)
    assert torch.equal(found.at(1), found.values[:, 0])


@pytest.mark.model
def test_a_bos_token_stands_before_the_prompt_only_on_request(
    model: Any, episodes: list[tv.Episode]
) -> None:
    tokens = tokens_of(model, episodes[0])
    with_bos = torch.cat([torch.tensor([[model.tokenizer.bos_token_id]]), tokens], dim=1)
    for bos, expected in ((False, tokens), (True, with_bos)):
        with torch.no_grad():
            _, cache = model.run_with_cache(expected)
        found = tv.collect(model, zoo.with_bos(episodes[:1], bos))
        torch.testing.assert_close(
            found.values[0, 1], cache["blocks.1.hook_resid_post"][0, -1], atol=1e-4, rtol=1e-4
        )
        assert found.source.bos is bos


@pytest.mark.model
def test_nothing_runs_after_the_last_layer_asked_for(
    model: Any, episodes: list[tv.Episode]
) -> None:
    seen: list[str] = []

    def note(activation: torch.Tensor, hook: Any) -> None:
        seen.append(hook.name)

    with model.hooks([("blocks.0.hook_resid_pre", note), ("blocks.2.hook_resid_pre", note)]):
        tv.collect(model, episodes[:1], layers=[1])
    assert len(seen) == 1


@pytest.mark.model
def test_a_hook_that_raises_leaves_the_model_as_it_was(
    model: Any, episodes: list[tv.Episode]
) -> None:
    tokens = tokens_of(model, episodes[0])
    with torch.no_grad():
        before = model(tokens)

    def fail(activation: torch.Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_until(model, tokens, None, [("blocks.0.hook_resid_post", fail)], "ln_final.hook_scale")
    assert hooks_on(model) == 0
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), before)


def hooks_on(model: Any) -> int:
    points = {id(point): point for point in model.hook_dict.values()}
    return sum(len(point.fwd_hooks) + len(point._forward_hooks) for point in points.values())


def test_a_recurrent_model_is_read_after_each_block(
    tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    mamba = zoo.bridge("mamba", tokenizer)
    found = tv.collect(mamba, episodes)
    for row, episode in enumerate(episodes):
        with torch.no_grad():
            _, cache = mamba.run_with_cache(tokens_of(mamba, episode))
        expected = torch.stack([cache[f"blocks.{i}.hook_resid_post"][0, -1] for i in range(3)])
        torch.testing.assert_close(found.values[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.model
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [3]}, "layer 3 is out of range: .* has layers 0 to 2"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [1, 1]}, "twice"),
        ({"hook": "resid_pots"}, "no hook point 'blocks.0.hook_resid_pots'"),
        ({"position": 200}, "position 200 is outside a prompt"),
    ],
)
def test_places_that_do_not_exist_are_refused(
    model: Any, episodes: list[tv.Episode], arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tv.collect(model, episodes, **arguments)


def test_no_episodes_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="episodes is empty"):
        tv.collect(model, [])
