"""Extracted task vectors: by contrast, from separators, of states, and linear maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import planted
import pytest
import torch
from planted import TEMPLATE, WORKS
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.interventions.modes import AddMapped, KeepNorm
from transformer_lens_taskvec.models.tokens import separators
from transformer_lens_taskvec.tasks.bijections import bijection_task
from transformer_lens_taskvec.vectors.contrast import (
    contrast_vectors,
    in_context_vectors,
    instruction_vectors,
)
from transformer_lens_taskvec.vectors.linear import linear_maps
from transformer_lens_taskvec.vectors.separators import (
    separator_means,
    separator_vectors,
    up_to_each_separator,
)
from transformer_lens_taskvec.vectors.states import MOMENTUM, state_vectors, state_weights

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore:.*distinct inputs"),
    pytest.mark.filterwarnings("ignore:.*one intervention at a time"),
]
SHIFTS = planted.tasks()
Episodes = list[tv.Episode]


@pytest.fixture(scope="module")
def truth() -> Any:
    """The model with planted weights."""
    return planted.planted()


@pytest.fixture(scope="module")
def shifts() -> dict[str, Episodes]:
    return {
        "train": tv.sample_episodes(SHIFTS, 24, 4, seed=0, template=TEMPLATE),
        "test": tv.sample_episodes(SHIFTS, 8, 4, seed=1, template=TEMPLATE),
    }


@pytest.fixture(scope="module")
def toy() -> Any:
    return tv.load_model("toy")


@pytest.fixture(scope="module")
def bits() -> dict[str, Episodes]:
    tasks = tv.find_tasks(["AND", "XOR", "NOR"])
    return tv.sample_splits(tasks, {"train": 12, "test": 16}, n_shots=6, seed=0)


def tokens_of(model: Any, text: str) -> list[int]:
    return list(model.tokenizer.encode(text, add_special_tokens=False))


def cache_of(model: Any, text: str) -> Any:
    """One unpadded run by hand."""
    with torch.no_grad():
        return model.run_with_cache(torch.tensor([tokens_of(model, text)]))[1]


def nll(model: Any, episode: tv.Episode, hooks: list[Any]) -> float:
    """One unpadded run by hand."""
    prompt, answer = tokens_of(model, episode.prompt), tokens_of(model, episode.answer)
    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([prompt + answer]), fwd_hooks=hooks)
    logp = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return -float(logp[range(len(answer)), answer].sum())


def accuracy(model: Any, found: Any, episodes: Episodes) -> dict[int | None, float]:
    """The mean accuracy by layer in prompts without demonstrations."""
    sweep = tv.layer_sweep(model, tv.zero_shot(episodes), found)
    return {layer: float(sweep.at(layer).mean()) for layer in found.layers}


def hold_the_planted_directions(vectors: tv.TaskVectors) -> bool:
    """Whether tasks differ by the planted directions where nothing else tells them apart."""
    expected = planted.planted_directions()
    expected = expected - expected.mean(dim=0)
    cosines = []
    for layer in WORKS:
        found = vectors.at(layer) - vectors.at(layer).mean(dim=0)
        cosines.append(torch.nn.functional.cosine_similarity(found, expected, dim=-1))
    return bool((torch.stack(cosines) > 0.9999).all())


EXTRACTED: dict[str, Callable[..., Any]] = {
    "contrast": contrast_vectors,
    "separator means": lambda *both: separator_means(*both, hook="resid_post", mode="replace"),
    "later separators": lambda *both: separator_means(
        *both, first=2, hook="resid_post", mode="replace"
    ),
    "one prompt's separator": separator_vectors,
    "states": state_vectors,
    "states without momentum": lambda *both: state_vectors(*both, momentum=None),
    "linear": linear_maps,
}


@pytest.mark.parametrize("method", EXTRACTED)
def test_a_method_finds_what_is_planted_and_nothing_before_it_is_written(
    truth: Any, shifts: dict[str, Episodes], method: str
) -> None:
    found = EXTRACTED[method](truth, shifts["train"])
    assert isinstance(found, tv.Injectable) and found.tasks == tuple(SHIFTS)
    by_layer = accuracy(truth, found, shifts["test"])
    assert by_layer[0] == 0 and all(by_layer[layer] == 1 for layer in WORKS)
    sweep = tv.layer_sweep(truth, tv.zero_shot(shifts["test"]), found, controls=True)
    assert all(sweep.controls["other task"].at(layer).max() == 0 for layer in WORKS)
    if isinstance(found, tv.TaskVectors):
        assert hold_the_planted_directions(found)


@pytest.mark.parametrize("method", EXTRACTED)
def test_a_method_works_in_a_trained_model(
    toy: Any, bits: dict[str, Episodes], method: str
) -> None:
    found = EXTRACTED[method](toy, bits["train"])
    sweep = tv.layer_sweep(toy, tv.zero_shot(bits["test"]), found)
    assert (sweep.at(1) > sweep.baseline_accuracy + 0.4).all()


def test_contrast_is_few_shot_minus_zero_shot(toy: Any, bits: dict[str, Episodes]) -> None:
    found = contrast_vectors(toy, bits["train"], layers=[1])
    own = [episode for episode in bits["train"] if episode.task == "XOR"]
    name = "blocks.1.hook_resid_post"
    changes = [
        cache_of(toy, episode.prompt)[name][0, -1]
        - cache_of(toy, tv.zero_shot([episode])[0].prompt)[name][0, -1]
        for episode in own
    ]
    torch.testing.assert_close(
        found["XOR", 1], torch.stack(changes).mean(dim=0), atol=1e-4, rtol=1e-4
    )
    assert (found.source.mode, found.source.n_shots) == ("add", (6,))


def test_an_in_context_vector_is_scikit_learns_component_plus_the_mean(
    toy: Any, bits: dict[str, Episodes]
) -> None:
    train = [*bits["train"][:2], *bits["train"][-2:]]
    found = in_context_vectors(toy, train, length=0.3)
    assert found.tasks == ("AND", "NOR")
    for task in found.tasks:
        own = [episode for episode in train if episode.task == task]
        pairs = {pair for episode in own for pair in (*episode.demos, episode.query)}
        assert len(pairs) > 10
        differences = []
        for pair in pairs:
            x, y = (cache_of(toy, text) for text in (pair.x, pair.y))
            names = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]
            differences.append(torch.cat([y[name][0, -1] - x[name][0, -1] for name in names]))
        fitted = PCA(n_components=1, svd_solver="full").fit(
            torch.stack(differences).double().numpy()
        )
        component = fitted.components_[0] * (1 if fitted.components_[0] @ fitted.mean_ > 0 else -1)
        expected = torch.tensor(component + fitted.mean_).reshape(4, -1)
        expected = 0.3 * expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found.vectors[task].double(), expected, atol=1e-4, rtol=1e-3)


def test_in_context_vectors_turn_what_every_mlp_writes_at_every_token(
    toy: Any, bits: dict[str, Episodes]
) -> None:
    found = in_context_vectors(toy, bits["train"])
    episode = bits["test"][0]

    def turned(layer: int) -> Any:
        vector = found.vectors[episode.task, layer]

        def hook(mlp: torch.Tensor, hook: Any) -> torch.Tensor:
            length = mlp.norm(dim=-1, keepdim=True)
            cosine = (mlp @ -vector)[..., None] / length / vector.norm()
            new = mlp / length + (1 + cosine.clamp(min=0)) * vector
            return length * new / new.norm(dim=-1, keepdim=True)

        return f"blocks.{layer}.hook_mlp_out", hook

    expected = nll(toy, episode, [turned(layer) for layer in range(4)])
    edited = tv.evaluate(toy, [episode], found.inject(episode.task, None))
    assert float(edited.loss[0]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert abs(expected - nll(toy, episode, [])) > 1e-2 * expected


def test_turning_keeps_lengths_and_turns_further_what_points_away() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, vector = (torch.randn(*shape, generator=generator) for shape in ((5, 8), (8,)))
    vector = 0.2 * vector / vector.norm()
    edited = KeepNorm()(rows, vector)
    torch.testing.assert_close(edited.norm(dim=1), rows.norm(dim=1))
    side = torch.nn.functional.cosine_similarity(rows, vector, dim=1)
    step = (
        rows / rows.norm(dim=1, keepdim=True) + torch.where(side < 0, 1 - side, 1)[:, None] * vector
    )
    assert (side < 0).any() and (side > 0).any()
    torch.testing.assert_close(
        torch.nn.functional.normalize(edited, dim=1), torch.nn.functional.normalize(step, dim=1)
    )
    assert KeepNorm()(rows.half(), vector.half()).dtype == torch.float16
    assert not torch.allclose(KeepNorm()(rows, -vector), edited)  # a negative scale turns away


def test_in_context_vectors_cannot_tell_tasks_that_permute_the_same_outputs(
    truth: Any, shifts: dict[str, Episodes]
) -> None:
    # The mean difference between outputs and inputs is the same for every shift.
    found = in_context_vectors(truth, shifts["train"], length=1.0)
    assert accuracy(truth, found, shifts["test"]) == {None: 0}


def test_instructions_are_read_without_demonstrations(
    toy: Any, truth: Any, bits: dict[str, Episodes], shifts: dict[str, Episodes]
) -> None:
    own = [episode for episode in bits["train"] if episode.task == "XOR"]
    texts = [f"any\nexample:{episode.query.x}->" for episode in own]
    states = [cache_of(toy, text)["blocks.2.hook_resid_post"][0, -1] for text in texts]
    found = instruction_vectors(toy, own, instructions={"XOR": "any"}, layers=[2])
    torch.testing.assert_close(
        found["XOR", 2], torch.stack(states).mean(dim=0), atol=1e-4, rtol=1e-4
    )
    named = instruction_vectors(toy, own)
    again = instruction_vectors(toy, own, instructions=["XOR"] * len(own))
    assert torch.equal(named.values, again.values)
    assert not torch.allclose(named["XOR", 2], found["XOR", 2], atol=1e-2)
    # Neither model was taught its tasks' names; to one of them all words are the same.
    assert max(accuracy(toy, instruction_vectors(toy, bits["train"]), bits["test"]).values()) < 0.5
    same = instruction_vectors(truth, shifts["train"]).values
    assert (same - same.mean(dim=0)).abs().max() < 1e-3


def test_a_prompt_is_cut_after_each_separator(model: Any, toy: Any, episodes: Episodes) -> None:
    for of, some in ((model, episodes), (toy, tv.sample_episodes(tv.find_tasks(["OR"]), 2, 3, 0))):
        for episode, places in zip(some, separators(of, some), strict=True):
            whole = tokens_of(of, episode.prompt)
            cut = up_to_each_separator([episode])
            assert [one.n_shots for one in cut] == list(range(episode.n_shots + 1))
            assert cut[-1] == episode and len(places) == len(cut)
            for one, place in zip(cut, places, strict=True):
                assert tokens_of(of, one.prompt) == whole[: len(whole) + place + 1]
                assert of.tokenizer.decode(whole[place]).strip() in ("->", ">")
            asked = [one.query for one in cut]
            assert asked == [*episode.demos, episode.query]
            assert up_to_each_separator([episode], first=1) == cut[1:]


def test_separator_means_are_over_all_separators(toy: Any, bits: dict[str, Episodes]) -> None:
    own = [episode for episode in bits["train"] if episode.task == "AND"][:3]
    arrow = tokens_of(toy, "->")[0]
    for first in (0, 2):
        states = []
        for episode in own:
            places = [i for i, token in enumerate(tokens_of(toy, episode.prompt)) if token == arrow]
            assert len(places) == 7
            states.append(
                cache_of(toy, episode.prompt)["blocks.2.hook_resid_pre"][0, places[first:]]
            )
        found = separator_means(toy, own, first=first)
        torch.testing.assert_close(
            found["AND", 2], torch.cat(states).mean(dim=0), atol=1e-4, rtol=1e-4
        )
        assert (found.source.hook, found.source.mode, found.source.n) == ("resid_pre", "add", (3,))


def test_adding_a_mean_works_where_it_can_be_added(
    toy: Any, truth: Any, bits: dict[str, Episodes], shifts: dict[str, Episodes]
) -> None:
    added = accuracy(toy, separator_means(toy, bits["train"]), bits["test"])
    assert added[2] > 0.8  # before layer 2 is after layer 1
    # Twice the planted constant: behind the layer norms, everything else is half as large.
    assert (
        max(accuracy(truth, separator_means(truth, shifts["train"]), shifts["test"]).values()) < 0.5
    )


@pytest.mark.parametrize("n_separators", [1, 2, 3])
def test_vectors_at_separators_change_these_positions_and_no_other(
    model: Any, episodes: Episodes, n_separators: int
) -> None:
    two_shot = [episode for episode in episodes if episode.n_shots == 2]
    found = separator_vectors(model, two_shot, n_separators=n_separators, seed=4)
    assert found.n_separators == n_separators and found.layers == (0, 1, 2)
    scores = tv.evaluate_many(model, two_shot, lambda task: [found.inject(task, 1)])[0]
    for row, (episode, places) in enumerate(
        zip(two_shot, separators(model, two_shot), strict=True)
    ):
        length = len(tokens_of(model, episode.prompt))
        at = [length + place for place in places][-n_separators:]

        def hook(
            resid: torch.Tensor, hook: Any, episode: Any = episode, at: Any = at
        ) -> torch.Tensor:
            edited = resid.clone()
            edited[0, at] = found.values[found.tasks.index(episode.task), 1]
            return edited

        expected = nll(model, episode, [("blocks.1.hook_resid_post", hook)])
        assert float(scores.loss[row]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_each_separator_gets_the_state_of_another_prompt(
    toy: Any, bits: dict[str, Episodes]
) -> None:
    states = tv.collect(toy, bits["train"])
    many = separator_vectors(toy, bits["train"], n_separators=5)
    chosen = set()
    for index, task in enumerate(many.tasks):
        own = states.values[states.labels == index]
        for vector in many.values[index].unbind(dim=1):
            distance = (own - vector).abs().amax(dim=(1, 2))
            assert distance.min() < 1e-4
            chosen.add((task, int(distance.argmin())))
    assert len(chosen) == 5 * len(many.tasks)
    other = separator_vectors(toy, bits["train"], n_separators=5, seed=1)
    assert not torch.allclose(other.values, many.values)
    few = separator_vectors(toy, bits["train"][:2], n_separators=3)
    assert torch.allclose(few.values[:, :, 0], few.values[:, :, 2])  # only two prompts


def test_all_separators_of_one_prompt(toy: Any, bits: dict[str, Episodes]) -> None:
    own = bits["train"][:1]
    found = separator_vectors(toy, own, n_separators=7, one_prompt=True)
    resid = cache_of(toy, own[0].prompt)["blocks.1.hook_resid_post"][0]
    (places,) = separators(toy, own)
    torch.testing.assert_close(found.values[0, 1], resid[list(places)], atol=1e-4, rtol=1e-4)
    last = separator_vectors(toy, own, n_separators=2, one_prompt=True)
    torch.testing.assert_close(last.values, found.values[:, :, -2:], atol=1e-5, rtol=1e-4)


def test_vectors_at_all_separators_help_a_prompt_with_one_demonstration(toy: Any) -> None:
    tasks = tv.find_tasks(["XOR", "OR", "NOR"])
    sets = tv.sample_splits(tasks, {"train": 12, "test": 20}, n_shots=6, seed=2)
    one_shot = [replace(episode, demos=episode.demos[:1]) for episode in sets["test"]]
    found = separator_vectors(toy, sets["train"], n_separators=2)
    sweep = tv.layer_sweep(toy, one_shot, found, controls=True)
    assert sweep.at(1).mean() > max(0.95, float(sweep.baseline_accuracy.mean()))
    assert sweep.controls["random"].at(1).mean() < 0.5
    with pytest.raises(ValueError, match="outside a prompt of 1 separators"):
        tv.layer_sweep(toy, tv.zero_shot(one_shot), found)


def test_the_weights_of_states_are_the_papers() -> None:
    states = torch.randn(11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = states[4:].mean(dim=0)  # of ten demonstrations and the query: the last seven
    for weight, at in ((1, 5), (2, 6), (4, 7), (8, 8), (16, 9)):
        expected = expected + weight / 31 * (states[at] - states[at - 1])
    found = state_weights(10).double() @ states
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    inner = state_weights(10, momentum=None).double() @ states
    torch.testing.assert_close(inner, states[4:].mean(dim=0), atol=1e-6, rtol=0)
    half = state_weights(10, rate=0.5).double() @ states
    torch.testing.assert_close(half, (expected + inner) / 2, atol=1e-6, rtol=0)


def test_short_prompts_have_fewer_states_and_differences() -> None:
    assert state_weights(0).tolist() == [1]
    assert state_weights(1).tolist() == [0, 1]
    assert state_weights(2).tolist() == [0, 0.5, 0.5]  # the one difference weighs nothing
    expected = torch.tensor([0, 1 / 4 - 8 / 24, 1 / 4 + 8 / 24 - 16 / 24, 1 / 4 + 16 / 24, 1 / 4])
    torch.testing.assert_close(state_weights(4), expected)
    for n in range(14):
        assert float(state_weights(n).sum()) == pytest.approx(1, abs=1e-6)
    assert sum(MOMENTUM) == 31


def test_state_vectors_weigh_what_attention_writes(toy: Any, bits: dict[str, Episodes]) -> None:
    own = bits["train"][:2]
    found = state_vectors(toy, own)
    weights = state_weights(6)
    for layer in (0, 3):
        rows = [
            weights
            @ cache_of(toy, episode.prompt)[f"blocks.{layer}.hook_attn_out"][0, list(places)]
            for episode, places in zip(own, separators(toy, own), strict=True)
        ]
        torch.testing.assert_close(
            found.vectors[own[0].task, layer], torch.stack(rows).mean(dim=0), atol=1e-4, rtol=1e-4
        )
    edits = found.inject(own[0].task, 2)
    assert [(edit.layer, edit.mode, edit.hook) for edit in edits] == [
        (layer, "replace", "attn_out") for layer in range(3)
    ]


def test_controls_of_vectors_up_to_a_layer_are_as_many(toy: Any, bits: dict[str, Episodes]) -> None:
    found = state_vectors(toy, bits["train"])
    made = tv.control_vectors(found, toy, bits["train"], extract=state_vectors)
    for layer in found.layers:
        edits = found.inject("XOR", layer)
        for control in made.values():
            assert [edit.name for edit in control.inject("XOR", layer)] == [e.name for e in edits]
        lengths = [float(edit.vector.norm()) for edit in made["random"].inject("XOR", layer)]
        assert lengths == pytest.approx([float(edit.vector.norm()) for edit in edits], rel=1e-4)
        before = found.inject(found.tasks[found.tasks.index("XOR") - 1], layer)
        for other, edit in zip(made["other task"].inject("XOR", layer), before, strict=True):
            assert torch.equal(other.vector, edit.vector)


@pytest.mark.parametrize("ridge", [0.01, 1.0, 30.0])
def test_a_linear_map_is_scikit_learns_ridge(
    toy: Any, bits: dict[str, Episodes], ridge: float
) -> None:
    found = linear_maps(toy, bits["train"], ridge=ridge)
    few, zero = (tv.collect(toy, some) for some in (bits["train"], tv.zero_shot(bits["train"])))
    new = tv.collect(toy, tv.zero_shot(bits["test"]))
    for index, task in enumerate(found.tasks):
        for layer in found.layers:
            x, y = (of.at(layer)[of.labels == index].double() for of in (zero, few))
            penalty = ridge * float((x - x.mean(dim=0)).square().sum(dim=1).mean())
            fitted = Ridge(alpha=penalty, fit_intercept=True, solver="svd").fit(x, y - x)
            torch.testing.assert_close(
                found.matrix(task, layer).double(), torch.tensor(fitted.coef_), atol=1e-3, rtol=1e-2
            )
            rows = new.at(layer)[new.labels == index]
            (edit,) = found.inject(task, layer)
            expected = rows + torch.tensor(fitted.predict(rows.double())).float()
            torch.testing.assert_close(edit.edit(rows), expected, atol=1e-3, rtol=1e-3)
            (half,) = found.inject(task, layer, scale=0.5)
            torch.testing.assert_close(half.edit(rows), (rows + expected) / 2, atol=1e-3, rtol=1e-3)
            assert found.at(task, layer).reads.shape == (12, 64)


def test_without_a_map_it_is_the_contrast_vector(toy: Any, bits: dict[str, Episodes]) -> None:
    found, contrast = (make(toy, bits["train"]) for make in (_nothing, contrast_vectors))
    assert torch.equal(found.change.values, contrast.values)
    assert found.at("XOR", 1).reads.shape == (0, 64)
    zero = tv.zero_shot(bits["test"])
    sweeps = [tv.layer_sweep(toy, zero, one) for one in (found, contrast)]
    torch.testing.assert_close(sweeps[0].loss, sweeps[1].loss, atol=1e-4, rtol=1e-4)
    smaller = [linear_maps(toy, bits["train"], ridge=ridge) for ridge in (0.1, 10.0, 1000.0)]
    sizes = [float(one.matrix("XOR", 1).norm()) for one in smaller]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.01 * sizes[0]


def _nothing(model: Any, episodes: Episodes) -> Any:
    return linear_maps(model, episodes, ridge=math.inf)


def test_a_map_does_what_no_constant_can_after_the_query_was_read(
    truth: Any, shifts: dict[str, Episodes]
) -> None:
    # There are six queries only, so that the map has seen all of those it is tested on.
    constant, mapped = (
        accuracy(truth, make(truth, shifts["train"]), shifts["test"])
        for make in (contrast_vectors, linear_maps)
    )
    assert constant[4] < 0.5 and mapped[4] == 1


def test_states_that_are_constant_have_no_map(truth: Any, shifts: dict[str, Episodes]) -> None:
    found = linear_maps(truth, shifts["train"], layers=[0])
    for task in found.tasks:
        assert found.matrix(task, 0).norm() < 0.1
        assert torch.isfinite(found.matrix(task, 0)).all()


def test_a_control_of_a_map_replaces_its_constant_part(toy: Any, bits: dict[str, Episodes]) -> None:
    found = linear_maps(toy, bits["train"])
    made = tv.control_vectors(found, toy, bits["train"], extract=linear_maps)
    assert list(made) == [
        "random",
        "other task",
        "mean",
        "shuffled labels",
        "zero-shot",
        "reinitialised",
    ]
    (edit,), (random,) = (one.inject("XOR", 1) for one in (found, made["random"]))
    assert float(random.vector.norm()) == pytest.approx(float(edit.vector.norm()), rel=1e-5)
    assert random.mode is edit.mode and isinstance(edit.mode, AddMapped)
    # The state without demonstrations says nothing of what they are not there to change.
    (nothing,) = made["zero-shot"].inject("XOR", 1)
    rows = tv.collect(toy, bits["test"]).at(1)
    torch.testing.assert_close(nothing.edit(rows), rows)


def test_both_directions_have_half_of_the_pairs_each() -> None:
    tasks = tv.find_tasks(["en_fr", "fr_en"])
    both = bijection_task(tasks["en_fr"], tasks["fr_en"])
    there, back = (
        {(pair.x, pair.y) for pair in tasks[name].pairs}  # type: ignore[attr-defined]
        for name in ("en_fr", "fr_en")
    )
    pairs = {(pair.x, pair.y) for pair in both.pairs}
    assert both.name == "en_fr+fr_en" and pairs <= there | back
    assert abs(len(pairs & there) - len(pairs & back)) <= 1
    words = [word for pair in pairs for word in pair]
    assert len(words) == len(set(words)), "a demonstration gives an answer away"
    assert len(pairs) > 200
    assert bijection_task(tasks["en_fr"], tasks["fr_en"]).pairs == both.pairs
    assert bijection_task(tasks["en_fr"], tasks["fr_en"], seed=1).pairs != both.pairs
    episodes = tv.sample_episodes([both], 20, 6, seed=0)
    mixed = [{(demo.x, demo.y) in there for demo in episode.demos} for episode in episodes]
    assert sum(len(kinds) == 2 for kinds in mixed) > 15


def _tasks(*sides: dict[str, str]) -> tuple[tv.Task, ...]:
    return tuple(tv.mapping_task(f"t{index}", side) for index, side in enumerate(sides))


ERRORS: dict[str, tuple[Callable[[Any, Episodes], Any], str]] = {
    "length": (
        lambda m, e: in_context_vectors(m, e, length=0.0),
        "length is 0.0; it must be a finite",
    ),
    "one example": (
        lambda m, e: in_context_vectors(m, tv.zero_shot(e[:1])),
        "'AND' have 1 distinct example",
    ),
    "instruction": (
        lambda m, e: instruction_vectors(m, e[:1], instructions=[" "]),
        "for 'AND' is empty",
    ),
    "first": (lambda m, e: separator_means(m, e, first=7), "first is 7; it must be 0 to 6"),
    "mode": (lambda m, e: separator_means(m, e, mode="put"), "mode is 'put'; it must be one of"),
    "no separator": (
        lambda m, e: separator_vectors(m, e, n_separators=0),
        "n_separators is 0; it must be 1",
    ),
    "too many": (
        lambda m, e: separator_vectors(m, e, n_separators=8, one_prompt=True),
        "n_separators is 8, and a prompt of 'AND' has 7",
    ),
    "one position": (
        lambda m, e: separator_vectors(m, e, n_separators=2).inject("AND", 1, position=-1),
        "position is -1, and there are 2 vectors",
    ),
    "no layer": (
        lambda m, e: separator_vectors(m, e).inject("AND", None),
        "layer None is not among",
    ),
    "last": (lambda m, e: state_vectors(m, e, last=0), "last is 0; it must be 1 or more"),
    "momentum": (lambda m, e: state_vectors(m, e, momentum=[-1.0]), r"momentum is \[-1.0\]"),
    "ridge": (lambda m, e: linear_maps(m, e, ridge=0.0), "ridge is 0.0; it must be above 0"),
    "mode of a map": (
        lambda m, e: linear_maps(m, e[:2]).inject("AND", 1, mode="add"),
        "mode is 'add', and a map has one way",
    ),
    "not pairs": (
        lambda m, e: bijection_task(*tv.find_tasks(["XOR", "OR"]).values()),
        "'XOR' is a .*, without a list of pairs",
    ),
    "not reversed": (
        lambda m, e: bijection_task(*_tasks({"a": "b", "c": "d"}, {"b": "a"})),
        "'t1' does not undo 't0': Example\\(x='c', y='d'\\) is not reversed",
    ),
    "nothing left": (
        lambda m, e: bijection_task(*_tasks({"a": "b", "b": "a"}, {"b": "a", "a": "b"})),
        "have 0 pairs whose words occur once",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_refused(toy: Any, bits: dict[str, Episodes], case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call(toy, bits["train"])


def test_a_task_that_is_not_there_is_named(toy: Any, bits: dict[str, Episodes]) -> None:
    for make in (separator_vectors, linear_maps):
        with pytest.raises(KeyError, match="task 'OR'; there are: AND, XOR, NOR"):
            make(toy, bits["train"]).inject("OR", 1)


def test_shared_demonstrations_are_warned_of(toy: Any) -> None:
    shared = tv.sample_episodes(tv.find_tasks(["OR"]), 16, 3, seed=0, demo_sets=8)
    for make in (contrast_vectors, separator_means, state_vectors, linear_maps):
        with pytest.warns(UserWarning, match="share 8 sets of demonstrations"):
            make(toy, shared)
