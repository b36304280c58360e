"""Positions at separators: found in every episode, refused where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.cli import app
from transformer_lens_taskvec.interventions import Separator
from transformer_lens_taskvec.models.tokens import separators

pytestmark = pytest.mark.filterwarnings("ignore:.*one intervention at a time")

WIDTH = 32


def vector(seed: int) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.model
def test_a_separator_is_the_token_before_an_output(model: Any, episodes: list[tv.Episode]) -> None:
    found = separators(model, episodes)
    for episode, places in zip(episodes, found, strict=True):
        assert len(places) == episode.n_shots + 1 and places[-1] == -1
        tokens = model.tokenizer(episode.prompt, add_special_tokens=False)["input_ids"]
        for place, begin in zip(places, episode.outputs_begin, strict=True):
            before = model.tokenizer.decode(tokens[: len(tokens) + place + 1])
            assert episode.prompt[:begin].startswith(before)
            assert len(episode.prompt[:begin]) - len(before) <= 1


@pytest.mark.model
def test_each_episode_is_edited_at_its_own_separator(
    model: Any, episodes: list[tv.Episode]
) -> None:
    """Prompts of several lengths in one call, against one at a time with the position given."""
    edits = [
        tv.inject(vector(0), 0, position=Separator(0)),
        tv.inject(vector(1), 1, mode="add", position=Separator(-2)),
    ]
    together = tv.evaluate(model, episodes, edits)
    texts = tv.generate(model, episodes, edits, max_new_tokens=3)
    for row, (episode, places) in enumerate(
        zip(episodes, separators(model, episodes), strict=True)
    ):
        own = [
            tv.inject(vector(0), 0, position=places[0]),
            tv.inject(vector(1), 1, mode="add", position=places[-2]),
        ]
        alone = tv.evaluate(model, [episode], own)
        assert float(together.loss[row]) == pytest.approx(float(alone.loss[0]), abs=1e-4)
        assert texts[row] == tv.generate(model, [episode], own, max_new_tokens=3)[0]


@pytest.mark.model
def test_the_querys_separator_is_the_last_token(model: Any, episodes: list[tv.Episode]) -> None:
    for index, some in ((-1, episodes), (0, tv.zero_shot(episodes))):
        there = tv.evaluate(model, some, [tv.inject(vector(0), 1, position=Separator(index))])
        last = tv.evaluate(model, some, [tv.inject(vector(0), 1)])
        torch.testing.assert_close(there.loss, last.loss)


def test_a_lab_episodes_separators_are_its_inputs() -> None:
    run, problem = lab.shipped_run(), lab.SparseLinearMixture.small()
    model, episodes = run.model(), lab.problem_episodes(problem, n=2, n_shots=3)
    assert separators(model, episodes)[0] == (-7, -5, -3, -1)
    edit = tv.ablate(1, position=Separator(1))
    by_index = tv.ablate(1, position=-5)
    there, here = tv.evaluate_many(model, episodes, [[edit], [by_index]])
    assert torch.equal(there.loss, here.loss)
    assert not torch.equal(there.loss, tv.evaluate(model, episodes).loss)


@pytest.mark.model
def test_what_has_no_separator_is_refused(model: Any, episodes: list[tv.Episode]) -> None:
    edit = tv.inject(vector(0), 0, position=Separator(2))
    with pytest.raises(ValueError, match=r"Separator\(2\) is outside a prompt of 2 separators"):
        tv.evaluate(model, episodes, [edit])
    with pytest.raises(ValueError, match="texts have no separators"):
        tv.generate(model, ["a text"], [edit], max_new_tokens=1)
    with pytest.raises(ValueError, match="depends on the episode"):
        edit(torch.zeros(1, 4, WIDTH))
    with pytest.raises(ValueError, match="depends on the episode"):
        edit.spec()
    means = tv.task_vectors(tv.collect(model, episodes))
    with pytest.raises(ValueError, match="it must be 'own', or as for inject"):
        tv.layer_sweep(model, episodes, means, position="separator")


def test_two_names_with_a_plus_are_a_task_in_both_directions() -> None:
    found = tv.find_tasks(["en_fr+fr_en"])["en_fr+fr_en"]
    one_way = {(pair.x, pair.y) for pair in tv.find_tasks(["en_fr"])["en_fr"].pairs}
    kinds = [(pair.x, pair.y) in one_way for pair in found.pairs]
    assert 0.4 < sum(kinds) / len(kinds) < 0.6
    with pytest.raises(ValueError, match="joins 3 tasks"):
        tv.find_tasks(["en_fr+fr_en+en_fr"])
    with pytest.raises(ValueError, match="does not undo"):
        tv.find_tasks(["en_fr+es_en"])


def test_the_command_trains_a_dictionary(tmp_path: Path) -> None:
    out = tmp_path / "toy.safetensors"
    arguments = ["dictionary", "--model", "toy", "--layer", "1", "--out", str(out)]
    sizes = ["--tokens", "400", "--features", "32", "--steps", "3"]
    done = CliRunner().invoke(app, [*arguments, *sizes])
    assert done.exit_code == 0, done.output
    found = tv.vectors.TopKDictionary.load(out)
    assert found.W_dec.shape == (32, 64) and found.origin.layer == 1


def several_places() -> list[Any]:
    """Variants at the end, before it, at several places, and at separators; one of none."""
    return [
        [],
        [tv.inject(vector(0), 1)],
        [tv.inject(vector(1), 1, position=-3), tv.inject(vector(2), 0, mode="add")],
        [tv.ablate(1, hook="z", head=1, position=(-2, -1))],
        [tv.inject(vector(0), 0, position=Separator(0)), tv.ablate(1, hook="mlp_out")],
        [tv.inject(vector(3), 1, hook="resid_pre", position=Separator(-2), mode="add")],
        [tv.ablate(0, position=Separator(0), direction=vector(4))],
        [tv.ablate(1, position=None)],
        [tv.ablate(0, position=0)],
    ]


@pytest.mark.model
def test_edits_before_the_end_branch_with_the_same_numbers(
    model: Any, episodes: list[tv.Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    variants, observe = several_places(), tv.Observe(layers=[0, 1])
    kept, packed = tv.evaluate_many(model, episodes, variants, observe=observe)
    monkeypatch.setattr("transformer_lens_taskvec.interventions.packed._TAIL", 0)
    seen, plain = tv.evaluate_many(model, episodes, variants, observe=observe)
    torch.testing.assert_close(kept.values, seen.values, atol=1e-5, rtol=1e-4)
    for one, other in zip(packed, plain, strict=True):
        torch.testing.assert_close(one.loss, other.loss, atol=1e-4, rtol=1e-4)
    assert len({one.mean_loss for one in plain}) == len(
        variants
    )  # every variant does something of its own


def test_prompts_too_short_for_the_longest_tail_have_one_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toy = tv.load_model("toy")
    few_shot = tv.sample_episodes(tv.bitwise_tasks(null=False), 2, 4, seed=0)
    some = [*tv.zero_shot(few_shot[:3]), *few_shot[:5]]
    width = toy.cfg.d_model
    edits = [tv.inject(torch.ones(width), layer, position=Separator(0)) for layer in range(3)]
    packed = tv.evaluate_many(toy, some, [[edit] for edit in edits])
    monkeypatch.setattr("transformer_lens_taskvec.interventions.packed._TAIL", 0)
    plain = tv.evaluate_many(toy, some, [[edit] for edit in edits])
    for one, other in zip(packed, plain, strict=True):
        torch.testing.assert_close(one.loss, other.loss, atol=1e-4, rtol=1e-4)


def test_a_place_outside_a_prompt_is_refused() -> None:
    toy = tv.load_model("toy")
    bare = tv.zero_shot(tv.sample_episodes(tv.find_tasks(["XOR"]), 2, 2, seed=0))
    for position in (-30, -200, (-1, -40)):
        edit = tv.inject(torch.ones(64), 1, position=position)
        with pytest.raises(ValueError, match=r"outside a prompt of 13 token\(s\)"):
            tv.evaluate(toy, bare, [edit])


def test_a_place_that_is_given_twice_is_edited_once() -> None:
    toy = tv.load_model("toy")
    bare = tv.zero_shot(tv.sample_episodes(tv.find_tasks(["XOR"]), 4, 2, seed=0))
    edits = [tv.inject(torch.ones(64), 1, mode="add", position=at) for at in ((-3, -3), -3)]
    twice, once = tv.evaluate_many(toy, bare, [[edit] for edit in edits])
    torch.testing.assert_close(twice.loss, once.loss)
