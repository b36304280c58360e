"""Relative strengths, decay and the first new tokens, against hooks written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.interventions.modes import KeepNorm
from transformer_lens_taskvec.vectors.contrast import contrast_vectors
from transformer_lens_taskvec.vectors.linear import linear_maps

PROMPTS = ["example:cat->cats\nexample:dog->", "one two three", "a"]
NAME = "blocks.1.hook_resid_post"


def written(activation: torch.Tensor, vector: torch.Tensor, scale: float) -> torch.Tensor:
    lengths = activation.pow(2).sum(-1, keepdim=True).sqrt()
    return scale * lengths * vector / vector.pow(2).sum().sqrt()


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_a_relative_scale_is_in_units_of_the_activation_in_every_pass(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors, mode: str
) -> None:
    vector = 3 * vectors["en_fr", 1]
    edit = tv.inject(vector, 1, mode=mode, scale=0.7, relative=True)

    def by_hand(activation: torch.Tensor, hook: Any, at: int) -> torch.Tensor:
        edited = activation.clone()
        own = activation[:, at]
        edited[:, at] = written(own, vector, 0.7) + (own if mode == "add" else 0)
        return edited

    other = tv.inject(vectors["upper_case", 0], 0, mode="add")  # makes the norms others
    variants = [[], [edit], [other, edit], [tv.inject(vector, 1, mode=mode, scale=0.7)]]
    scores = tv.evaluate_many(model, episodes, variants)
    for row, episode in enumerate(episodes[:4]):
        prompt = model.tokenizer.encode(episode.prompt, add_special_tokens=False)
        answer = model.tokenizer.encode(episode.answer, add_special_tokens=False)
        at = len(prompt) - 1
        hooks: list[Any] = [(NAME, lambda x, hook, at=at: by_hand(x, hook, at))]
        with torch.no_grad():
            logits = model.run_with_hooks(torch.tensor([prompt + answer]), fwd_hooks=hooks)
        logprobs = logits[0, at:-1].log_softmax(-1)
        loss = -logprobs.gather(1, torch.tensor(answer)[:, None]).sum()
        torch.testing.assert_close(scores[1].loss[row], loss, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(scores[1].loss, scores[3].loss, atol=1e-2)
    # A function of the caller's own rules branches out: whole prompts find the same.
    nothing = ("blocks.0.hook_resid_post", lambda activation, hook: activation)
    plain = tv.evaluate(model, episodes, [other, edit, nothing])
    torch.testing.assert_close(scores[2].loss, plain.loss, atol=1e-3, rtol=1e-4)


def test_the_vectors_own_length_does_not_count() -> None:
    torch.manual_seed(0)
    vector, activation = torch.randn(8), torch.randn(2, 3, 8)
    for mode in ("add", "replace", KeepNorm(), lambda rows, v: rows - v):
        one, other = (
            tv.inject(factor * vector, 0, mode=mode, scale=0.5, relative=True)
            for factor in (1.0, 20.0)
        )
        torch.testing.assert_close(one(activation), other(activation))
    each = tv.inject(vector, 0, mode=lambda rows, v: rows - v, scale=0.5, relative=True)
    expected = activation.clone()
    expected[:, -1] -= written(activation[:, -1], vector, 0.5)
    torch.testing.assert_close(each(activation), expected)
    assert repr(one).endswith("position=-1)")
    assert "scale=0.5 of the norm" in repr(each)
    assert each != tv.inject(vector, 0, mode=each.mode, scale=0.5)


def test_a_relative_strength_of_one_head_is_in_units_of_that_heads_output() -> None:
    torch.manual_seed(0)
    vector, activation = torch.randn(4), torch.randn(2, 3, 5, 4)
    edit = tv.inject(vector, 0, mode="add", scale=2.0, relative=True, hook="z", head=3)
    expected = activation.clone()
    expected[:, -1, 3] += written(activation[:, -1, 3], vector, 2.0)
    torch.testing.assert_close(edit(activation), expected)


def test_what_has_no_relative_strength_is_refused() -> None:
    with pytest.raises(ValueError, match="'project' has no strength"):
        tv.inject(torch.ones(3), 0, mode="project", relative=True)
    with pytest.raises(ValueError, match="zero vector has no direction"):
        tv.inject(torch.zeros(3), 0, relative=True)
    with pytest.raises(ValueError, match="no declarative form"):
        tv.inject(torch.ones(3), 0, relative=True).spec(prompt_length=3)


def test_every_injectable_passes_a_relative_strength_on() -> None:
    model = tv.load_model("toy")
    episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 8, 4, seed=0)
    vectors = contrast_vectors(model, episodes)
    control = tv.control_vectors(vectors, kinds=["random"])["random"]
    edits = [some.inject("XOR", 1, relative=True, scale=0.5) for some in (vectors, control)]
    assert all(edit.relative and edit.scale == 0.5 for some in edits for edit in some)
    torch.manual_seed(0)
    activation = torch.randn(1, 2, 64)
    for (edit,) in edits:
        moved = (edit(activation) - activation)[0, -1]
        torch.testing.assert_close(moved.norm(), 0.5 * activation[0, -1].norm())
    with pytest.raises(ValueError, match="depends on the activation"):
        linear_maps(model, episodes).inject("XOR", 1, relative=True)


def by_hand(model: Any, prompt: str, n_new: int, strength: Any, vector: torch.Tensor) -> str:
    """Greedy continuation by whole passes; ``strength`` by new token, 0 the prompt's last."""
    tokens = list(model.tokenizer.encode(prompt, add_special_tokens=False))
    n_prompt = len(tokens)

    def add(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        edited = activation.clone()
        for at in range(n_prompt - 1, activation.shape[1]):
            edited[:, at] += strength(at - n_prompt + 1) * vector
        return edited

    for _ in range(n_new):
        with torch.no_grad():
            logits = model.run_with_hooks(torch.tensor([tokens]), fwd_hooks=[(NAME, add)])
        tokens.append(int(logits[0, -1].argmax()))
    return str(model.tokenizer.decode(tokens[n_prompt:], skip_special_tokens=True))


@pytest.mark.model
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("first", "decay"), [(1, 1.0), (3, 0.5), (None, 0.7)])
def test_vectors_act_on_the_first_tokens_with_decaying_strength(
    model: Any, use_cache: bool, first: int | None, decay: float
) -> None:
    vector = 4 * torch.linspace(-1, 1, 32)
    edit = tv.inject(vector, 1, mode="add", scale=2.0)

    def strength(t: int) -> float:
        return 2 * decay**t if first is None or t <= first else 0.0

    options: dict[str, Any] = {"max_new_tokens": 6, "use_cache": use_cache}
    found = tv.generate(model, PROMPTS, [edit], first=first, decay=decay, **options)
    assert found == [by_hand(model, prompt, 6, strength, vector) for prompt in PROMPTS]
    assert found != tv.generate(model, PROMPTS, [edit], first=None, decay=1.1, **options)


@pytest.mark.model
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": -1}, "first is -1"),
        ({"decay": 0.5}, "decay is 0.5 and first 0"),
        ({"decay": 0.0, "first": None}, "decay must be a finite number above 0"),
    ],
)
def test_strengths_that_mean_nothing_are_refused(
    model: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tv.generate(model, ["a"], max_new_tokens=2, **options)
