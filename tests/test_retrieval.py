"""Retrieval: ranks are those of a plain computation, among points with the same inputs."""

from __future__ import annotations

import itertools
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.activations import Source
from transformer_lens_taskvec.analysis.retrieval import by_chance
from transformer_lens_taskvec.tasks import with_same_inputs

SOURCE = Source("m", "resid_post", -1, "{x}->{y}", False)


def made(
    values: torch.Tensor, labels: list[int], inputs: list[int], queries: bool = True
) -> tv.Activations:
    """Activations of points with given tasks and inputs."""
    tasks = tuple("abcdefg"[: max(labels) + 1])
    own = torch.tensor([100 * label + one for label, one in zip(labels, inputs, strict=True)])
    layers = tuple(range(values.shape[1]))
    return tv.Activations(
        values,
        torch.tensor(labels),
        tasks,
        layers,
        SOURCE,
        own if queries else None,
        inputs=torch.tensor(inputs),
    )


def grid(
    task: float, own: float, *, n: int = 12, tasks: int = 4, copies: int = 1, seed: int = 0
) -> tv.Activations:
    """Points that are a task's vector and an input's, each times a factor, and noise."""
    g = torch.Generator().manual_seed(seed)
    of_tasks, of_inputs = torch.randn(tasks, 16, generator=g), torch.randn(n, 16, generator=g)
    labels = [label for label in range(tasks) for _ in range(n * copies)]
    inputs = [one for _ in range(tasks * copies) for one in range(n)]
    points = task * of_tasks[labels] + own * of_inputs[inputs]
    points = points + 0.3 * torch.randn(points.shape, generator=g)
    return made(points[:, None], labels, inputs)


def by_numpy(found: tv.Activations, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Each point's reciprocal rank, and whether it is 1, one point at a time."""
    points = found.values[:, layer].double().numpy()
    labels, inputs = found.labels.numpy(), found.inputs.numpy()
    distances, ranks = cdist(points, points), []
    for i in range(len(points)):
        left_out = (labels == labels[i]) & (inputs == inputs[i])
        order = [j for j in np.argsort(distances[i], kind="stable") if not left_out[j]]
        ranks.append(1 + next(at for at, j in enumerate(order) if labels[j] == labels[i]))
    return 1 / np.array(ranks), np.array(ranks) == 1


@pytest.mark.parametrize("copies", [1, 2])
def test_ranks_are_those_of_a_plain_computation(copies: int) -> None:
    points = grid(0.5, 0.7, copies=copies)
    found = tv.task_decodability(points, method="retrieval")
    order = found.activations
    expected, first = by_numpy(order)
    assert torch.allclose(found.hits[0], torch.tensor(expected).float())
    assert found.recall.hits[0].bool().tolist() == first.tolist()
    assert 0.05 < expected.mean() < 0.95 and len(set(expected)) > 4
    alone = tv.task_decodability(points, method="recall")
    assert alone.hits.equal(found.recall.hits) and alone.mean.equal(found.recall.mean)
    frame = found.to_frame()
    for task, own in frame.groupby("task"):
        rows = order.labels == order.tasks.index(task)
        assert own.td.item() == pytest.approx(expected[rows].mean(), abs=1e-6)
        assert own.recall.item() == pytest.approx(first[rows].mean(), abs=1e-6)
        assert own.low.item() < own.td.item() < own.high.item()
        assert own.n_distinct.item() == 12 and own.n.item() == 12 * copies


def test_points_of_the_tasks_are_found_and_points_of_the_inputs_are_not() -> None:
    by_task = tv.task_decodability(grid(3.0, 0.1), method="retrieval")
    by_input = tv.task_decodability(grid(0.0, 3.0), method="retrieval")
    nothing = tv.task_decodability(grid(0.0, 0.0, n=60), method="retrieval")
    assert float(by_task.mean) == float(by_task.recall.mean) == 1.0
    assert float(by_input.recall.mean) == 0.0  # the hard negatives come first
    assert float(by_input.mean) < 0.6 * by_input.chance
    assert abs(float(nothing.mean) - nothing.chance) < 0.05
    assert abs(float(nothing.recall.mean) - nothing.recall.chance) < 0.06


def test_chance_is_the_mean_over_all_orders() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    inputs = torch.tensor([0, 1, 1, 0, 0, 1, 1])
    for recall in (False, True):
        by_task: dict[int, list[float]] = {0: [], 1: []}
        for i in range(7):
            others = [
                bool(labels[j] == labels[i])
                for j in range(7)
                if labels[j] != labels[i] or inputs[j] != inputs[i]
            ]
            ranks = [1 + order.index(True) for order in itertools.permutations(others)]
            scores = [float(rank == 1) if recall else 1 / rank for rank in ranks]
            by_task[int(labels[i])].append(float(np.mean(scores)))
        expected = np.mean([np.mean(own) for own in by_task.values()])
        assert by_chance(labels, inputs, recall=recall) == pytest.approx(float(expected))


def test_labels_are_permuted_within_inputs() -> None:
    found = tv.task_decodability(grid(0.6, 0.5), method="retrieval")
    null = found.null(n_permutations=99, seed=1)
    assert null.p_value == 0.01
    noise = tv.task_decodability(grid(0.0, 0.0), method="retrieval").null(n_permutations=99)
    assert noise.p_value > 0.05
    # Points of the inputs alone are below chance, and so is what they are compared with.
    inputs = tv.task_decodability(grid(0.0, 3.0), method="retrieval")
    below = inputs.null(n_permutations=99)
    assert float(below.permuted.mean()) < 0.7 * inputs.chance and below.p_value > 0.05
    # One permutation, computed from the start.
    permuted = tv.analysis.permuted.permuted_labels(
        found.activations.labels, found.activations.inputs, 3, seed=1
    )
    for one, mean in zip(permuted.long(), found.null(3, seed=1).permuted, strict=True):
        again = made(
            found.activations.values, one.tolist(), found.activations.inputs.tolist(), False
        )
        for place in range(12):
            assert sorted(one[again.inputs == place].tolist()) == [0, 1, 2, 3]
        direct = np.array(by_numpy(again)[0])
        assert float(mean) == pytest.approx(
            np.mean([direct[one == task].mean() for task in range(4)]), abs=1e-6
        )


def test_a_pair_of_tasks_is_compared_alone_and_halves_have_whole_inputs() -> None:
    points = grid(0.5, 0.6)
    found = tv.task_decodability(points, method="retrieval")
    pair = torch.where(found.activations.labels.lt(2))[0]
    some = found.activations.select(pair)
    expected = by_numpy(some)[0]
    matrix = found.pairwise(0)
    assert float(matrix[0, 1]) == pytest.approx(expected[some.labels == 0].mean(), abs=1e-6)
    noise = torch.randn(48, 40, 16, generator=torch.Generator().manual_seed(2))
    layers = tv.task_decodability(
        made(noise, points.labels.tolist(), points.inputs.tolist()), method="retrieval"
    )
    # The best of 40 layers of noise is above chance; on other inputs it is not.
    assert float(layers.mean.max()) > layers.chance + 0.08
    assert abs(layers.held_out - layers.chance) < 0.08


def test_points_whose_inputs_are_not_shared_are_left_out_and_said_so() -> None:
    points = grid(0.5, 0.7)
    rows = torch.tensor([row for row in range(48) if row not in (0, 13)])  # inputs 0 and 1
    with pytest.warns(UserWarning, match="6 of 46 points are left out.*10 inputs are shared"):
        found = tv.task_decodability(points.select(rows), method="retrieval")
    assert len(found.activations) == 40 and found.hits.shape == (1, 40)
    assert set(found.activations.inputs.tolist()) == set(range(2, 12))
    shuffled = torch.tensor(random.Random(0).sample(range(48), 48))
    order = tv.task_decodability(points.select(shuffled), method="retrieval")
    assert torch.allclose(order.scores, tv.task_decodability(points, method="retrieval").scores)


def test_what_cannot_be_compared_is_refused() -> None:
    points = grid(0.5, 0.7)
    apart = made(points.values, points.labels.tolist(), list(range(48)))
    with pytest.raises(ValueError, match="share 0 of 48.*with_same_inputs"):
        tv.task_decodability(apart, method="retrieval")
    unknown = tv.Activations(points.values, points.labels, points.tasks, (0,), SOURCE)
    with pytest.raises(ValueError, match="inputs is None"):
        tv.task_decodability(unknown, method="retrieval")
    with pytest.raises(ValueError, match="method is 'knn'"):
        _ = tv.task_decodability(points).recall


def test_tasks_are_given_the_inputs_that_they_share() -> None:
    a = tv.mapping_task("a", {"1": "one", "2": "two", "3": "three", "x": "ex"})
    b = tv.mapping_task("b", {"3": "drei", "2": "zwei", "y": "ypsilon"})
    found = with_same_inputs([a, b])
    assert [[*map(str, (p.x, p.y))] for p in found["b"].pairs] == [["2", "zwei"], ["3", "drei"]]
    assert {p.x: p.y for p in found["a"].pairs} == {"2": "two", "3": "three"}
    assert len(with_same_inputs({"a": a, "b": b}, n=1)["a"]) == 1
    with pytest.raises(ValueError, match="n is 3 and the tasks a, b share 2 inputs"):
        with_same_inputs([a, b], n=3)

    class Endless:
        name = "endless"

        def sample(self, n: int, rng: Any) -> list[tv.Example]:
            return [tv.Example(str(i), str(i)) for i in range(n)]

    with pytest.raises(ValueError, match="'endless' does not say how many"):
        with_same_inputs([Endless(), a])


def test_the_toy_models_tasks_are_found_where_its_vectors_work() -> None:
    model = tv.load_model("toy")
    tasks = with_same_inputs(tv.bitwise_tasks(null=False), n=16)
    episodes = tv.sample_episodes(tasks, n=16, n_shots=4, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tv.task_decodability(tv.collect(model, episodes), method="retrieval")
    assert found.best_layer() in (1, 2) and float(found.recall.mean.max()) > 0.9
    assert float(found.mean[0]) < 0.7 and found.chance < 0.4
    shuffled = tv.shuffle_labels(episodes, seed=0)
    control = tv.task_decodability(tv.collect(model, shuffled), method="retrieval")
    assert float(control.mean.max()) < float(found.mean.max()) - 0.2
    observed, _ = tv.evaluate_many(model, episodes, [[]], observe=tv.Observe())
    again = tv.task_decodability(observed, method="retrieval")
    assert torch.allclose(again.hits, found.hits)


def test_inputs_of_numbers_are_known_too() -> None:
    problem = lab.SparseLinearMixture.small()
    one, two = lab.problem_episodes(problem, n=1, seed=0)[:2]
    assert one.input_id != two.input_id
    upper, plural = tv.find_tasks(["upper_case", "singular_plural"]).values()
    ids = [tv.Episode(task.name, (), tv.Example("cat", "?")).input_id for task in (upper, plural)]
    assert ids[0] == ids[1]
