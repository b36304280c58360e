"""Every analysis on a model whose truth is known."""

from __future__ import annotations

from typing import Any

import planted
import pytest
import torch
from planted import READER, TEMPLATE, WORKS, WRITER

import transformer_lens_taskvec as tv

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore:.*distinct inputs"),  # there are six, and all are wanted
]
TASKS = planted.tasks()
LAYERS = range(planted.N_LAYERS)
ENCODED = range(WRITER[0], planted.N_LAYERS)


@pytest.fixture(scope="module")
def model() -> Any:
    return planted.planted()


@pytest.fixture(scope="module")
def train() -> list[tv.Episode]:
    return tv.sample_episodes(TASKS, 60, 4, seed=0, template=TEMPLATE)


@pytest.fixture(scope="module")
def test() -> list[tv.Episode]:
    return tv.sample_episodes(TASKS, 20, 4, seed=1, template=TEMPLATE)


@pytest.fixture(scope="module")
def activations(model: Any, train: list[tv.Episode]) -> tv.Activations:
    return tv.collect(model, train)


@pytest.fixture(scope="module")
def vectors(activations: tv.Activations) -> tv.TaskVectors:
    return tv.task_vectors(activations)


def test_the_model_does_the_tasks_it_is_shown_and_no_other(
    model: Any, test: list[tv.Episode]
) -> None:
    assert tv.evaluate(model, test).accuracy == 1
    assert tv.evaluate(model, test).mean_loss < 1e-4
    assert tv.evaluate(model, tv.zero_shot(test)).accuracy == 0
    said = tv.generate(model, [episode.prompt for episode in test], max_new_tokens=1)
    assert [text.strip() for text in said] == [episode.query.y for episode in test]


def test_td_is_chance_below_the_writing_layer_and_one_from_it_on(
    activations: tv.Activations,
) -> None:
    td = tv.task_decodability(activations, 5)
    # Below, all prompts are the same point, and chance decides whose neighbours they are.
    assert float(td.at(0).mean()) == pytest.approx(td.chance, abs=0.1)
    assert td.at(0).min() > 0.1 and td.at(0).max() < 0.6
    assert all((td.at(layer) == 1).all() for layer in ENCODED)
    assert td.best_layer() == WRITER[0] and td.held_out == 1
    assert (td.null(200).p_values[1:] == 1 / 201).all() and td.null(200).p_values[0] > 0.05
    for method in ("centroid", "linear", "cosine"):
        other = tv.task_decodability(activations, 5, method=method)
        assert all((other.at(layer) == 1).all() for layer in WORKS)
        assert float(other.at(0).mean()) < 0.5
    assert torch.nan_to_num(td.pairwise(WRITER[0]), nan=1.0).eq(1).all()


def test_task_vectors_are_the_planted_directions(vectors: tv.TaskVectors) -> None:
    directions = planted.planted_directions()
    expected = directions - directions.mean(dim=0)
    for layer in LAYERS:
        found = vectors.at(layer)
        differences = found - found.mean(dim=0)
        if layer == 0:
            assert differences.abs().max() < 1e-4
            continue
        cosine = torch.nn.functional.cosine_similarity(differences, expected, dim=-1)
        assert (cosine > 0.999999).all()
        torch.testing.assert_close(differences, expected, atol=2e-3, rtol=0)
    assert vectors.subspace(1).directions.shape[0] == 2


def test_vectors_work_between_writing_and_reading_only(
    model: Any, test: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    sweep = tv.layer_sweep(model, tv.zero_shot(test), vectors, controls=True)
    for layer in LAYERS:
        accuracy = sweep.at(layer)
        if layer in WORKS:
            assert (accuracy == 1).all()
        elif layer < WORKS[0]:
            assert (accuracy == 0).all()  # as without a vector
        else:  # every query gets the one answer that the vector itself holds most of
            for task in vectors.tasks:
                own = [episode for episode in test if episode.task == task]
                edit = [tv.inject(vectors[task, layer], layer)]
                prompts = [episode.prompt for episode in tv.zero_shot(own)]
                said = {
                    text.strip() for text in tv.generate(model, prompts, edit, max_new_tokens=1)
                }
                assert len(said) == 1
                queries = {episode.query for episode in own}
                share = sum(query.y in said for query in queries) / len(queries)
                assert float(sweep.at(layer)[sweep.tasks.index(task)]) == pytest.approx(share)
    assert sweep.best_layer() in WORKS and sweep.held_out == 1
    for kind, control in sweep.controls.items():
        assert all(control.at(layer).max() <= 0.2 for layer in WORKS), kind
    other = sweep.controls["other task"]
    assert all(other.at(layer).max() == 0 for layer in WORKS)


@pytest.mark.parametrize("layer", WORKS)
def test_another_tasks_vector_makes_every_answer_the_other_tasks(
    model: Any, test: list[tv.Episode], vectors: tv.TaskVectors, layer: int
) -> None:
    matrix = tv.perturbation_matrix(model, test, vectors, layer)
    own = torch.eye(len(TASKS), dtype=torch.bool)
    assert (matrix.delta_accuracy[own] == 0).all() and (matrix.delta_accuracy[~own] == -1).all()
    assert matrix.delta_loss[own].abs().max() < 1e-3 and matrix.delta_loss[~own].min() > 10
    first, second = vectors.tasks[:2]
    answers = {example.x: example.y for example in TASKS[second].pairs}  # type: ignore[attr-defined]
    edit = [tv.inject(vectors[second, layer], layer)]
    for episode in [e for e in test if e.task == first][:3]:
        said = tv.generate(model, [episode.prompt], edit, max_new_tokens=1)[0]
        assert said.strip() == answers[episode.query.x]


def test_taking_the_direction_out_takes_the_task_out(
    model: Any, test: list[tv.Episode], activations: tv.Activations, vectors: tv.TaskVectors
) -> None:
    directions = dict(zip(TASKS, planted.planted_directions(), strict=True))
    for task, direction in directions.items():
        own = [episode for episode in test if episode.task == task]
        others = [episode for episode in test if episode.task != task]
        edit = [tv.ablate(1, direction=direction)]
        assert tv.evaluate(model, own, edit).accuracy == 0
        assert tv.evaluate(model, others, edit).accuracy == 1
        rest = edit[0](activations.at(1)[:, None])[:, 0]
        torch.testing.assert_close(rest @ direction, torch.zeros(len(rest)), atol=1e-4, rtol=0)
    assert tv.evaluate(model, test, [tv.ablate(1)]).accuracy < 0.35  # not even the constant is left
    mean = vectors.values[:, 1].mean(dim=0)
    assert tv.evaluate(model, test, [tv.ablate(1, mean=mean)]).accuracy == 0
    # Adding the difference of two tasks turns one into the other.
    first, second = vectors.tasks[:2]
    difference = vectors[second, 1] - vectors[first, 1]
    turned = [tv.inject(difference, 1, mode="add")]
    own = [episode for episode in test if episode.task == first]
    assert tv.evaluate(model, own, turned).accuracy == 0
    inside = [tv.inject(vectors[second, 2], 2, mode=vectors.subspace(2))]
    assert tv.evaluate(model, own, inside).accuracy == 0
    own = [episode for episode in test if episode.task == second]
    assert tv.evaluate(model, own, inside).accuracy == 1


def test_steering_repairs_and_breaks(model: Any) -> None:
    with_null = {**TASKS, "Null": planted.Null()}
    many, few = (
        tv.sample_episodes(with_null, 40, shots, seed=2, template=TEMPLATE) for shots in (4, 0)
    )
    vectors = tv.task_vectors(tv.collect(model, many))
    for episodes, unperturbed in ((many, 1.0), (few, 0.0)):
        frame = tv.steering_effect(model, episodes, vectors, 1).to_frame().set_index("task")
        frame = frame.drop("Null")
        assert (frame.unperturbed == unperturbed).all()
        assert (frame.positive == 1).all() and (frame.negative == 0).all()


def test_one_head_writes_the_task_and_one_reads_the_query(
    model: Any, test: list[tv.Episode]
) -> None:
    effects = tv.head_effects(model, test)
    rest = torch.ones_like(effects.probability, dtype=torch.bool)
    rest[WRITER] = False
    assert effects.top(1) == (WRITER,)
    rest[READER] = False
    assert effects.probability[WRITER] > 0.8 and effects.probability[rest].abs().max() < 1e-6
    assert effects.probability[READER] < 0.01  # another prompt's query is no help
    # Without either head, or with the mean over all tasks in the writer's place, nothing is said.
    right = torch.exp(-tv.evaluate(model, test).loss).mean()
    wrong = torch.exp(-tv.evaluate(model, tv.zero_shot(test)).loss).mean()
    for ablation in ("zero", "mean"):
        pruned = tv.head_effects(model, test, on=test, ablation=ablation).by_task["probability"]
        assert (pruned[:, rest].abs() < 1e-6).all()
        for layer, head in (WRITER, READER):
            torch.testing.assert_close(
                pruned[:, layer, head], (wrong - right).expand(len(TASKS)), atol=1e-4, rtol=0
            )


def test_a_function_vector_of_one_head_is_the_planted_direction(
    model: Any, train: list[tv.Episode], test: list[tv.Episode]
) -> None:
    vectors = tv.function_vectors(model, train, n_heads=1)
    assert vectors.source.heads == (WRITER,) and vectors.source.mode == "add"
    for layer in vectors.layers:
        torch.testing.assert_close(
            vectors.at(layer), planted.planted_directions(), atol=2e-3, rtol=0
        )
    for task in vectors.tasks:
        queries = [e for e in tv.zero_shot(test) if e.task == task]
        for layer in WORKS:
            assert tv.evaluate(model, queries, vectors.inject(task, layer)).accuracy == 1


def test_controls_do_nothing_here(
    model: Any, train: list[tv.Episode], test: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    made = tv.control_vectors(vectors, model, train)
    sweep = tv.layer_sweep(model, tv.zero_shot(test), vectors, controls=made)
    found = tv.compare(
        sweep.scores_at(1), {kind: one.scores_at(1) for kind, one in sweep.controls.items()}
    ).to_frame()
    # Six queries prove nothing of eighteen comparisons, and yet every interval is above zero.
    assert (found.accuracy == 1).all() and (found.low > 0).all() and (found.n_distinct == 6).all()
    for kind in ("other task", "mean", "zero-shot"):
        assert (found[found.against == kind].other == 0).all()
    assert found.other.max() <= 0.4


def test_packed_is_plain(model: Any, test: list[tv.Episode], vectors: tv.TaskVectors) -> None:
    variants: list[list[tv.Intervention]] = [[]]
    for layer in LAYERS:
        variants += [[tv.inject(vectors.values[1, layer], layer)], [tv.ablate(layer)]]
    packed = tv.evaluate_many(model, test, variants)
    for variant, scores in zip(variants, packed, strict=True):
        hooks: list[Any] = [
            (edit.name, lambda activation, hook=None, edit=edit: edit(activation))
            for edit in variant
        ]
        plain = tv.evaluate(model, test, hooks)
        assert plain.correct.equal(scores.correct)
        torch.testing.assert_close(plain.loss, scores.loss, atol=1e-3, rtol=1e-4)
