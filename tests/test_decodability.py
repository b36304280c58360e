from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from statsmodels.stats.proportion import proportion_confint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.activations import Source
from transformer_lens_taskvec.analysis import classifiers
from transformer_lens_taskvec.analysis.permuted import under_permuted

SOURCE = Source("made", "resid_post", -1, "{x}->{y}", False)


def activations(
    n: int, tasks: int, layers: int = 2, spread: float = 1.0, offset: float = 0.0
) -> tv.Activations:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % tasks
    centres = torch.randn(tasks, layers, 6, generator=generator) * spread
    noise = torch.randn(n, layers, 6, generator=generator)
    names = tuple(f"task{i}" for i in range(tasks))
    values = centres[labels] + noise + offset
    return tv.Activations(values, labels, names, tuple(range(layers)), SOURCE)


def by_hand(points: torch.Tensor, labels: torch.Tensor, k: int) -> tuple[list[bool], list[bool]]:
    """Leave-one-out by scikit-learn, point by point, and where its vote is tied."""
    hits, tied = [], []
    for left_out in range(len(points)):
        rest = torch.arange(len(points)) != left_out
        fitted = KNeighborsClassifier(n_neighbors=k).fit(points[rest], labels[rest])
        predicted = fitted.predict(points[left_out : left_out + 1])[0]
        share = fitted.predict_proba(points[left_out : left_out + 1])[0]
        hits.append(bool(predicted == labels[left_out]))
        tied.append(int((share == share.max()).sum()) > 1)
    return hits, tied


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_scores_equal_scikit_learns_where_no_vote_is_tied(k: int, offset: float) -> None:
    found = activations(90, 3, offset=offset)
    ours = tv.task_decodability(found, k=k)
    for layer in range(2):
        hits, tied = by_hand(found.values[:, layer].double(), found.labels, k)
        for task in range(3):
            rows = [i for i in range(90) if found.labels[i] == task]
            sure = sum(hits[i] for i in rows if not tied[i])
            unsure = sum(tied[i] for i in rows)
            score = float(ours.scores[layer, task]) * len(rows)
            assert sure - 1e-4 <= score <= sure + unsure + 1e-4
            assert unsure or score == pytest.approx(sure)


def test_a_tied_vote_goes_to_the_class_with_the_nearer_neighbours() -> None:
    # The point at 0 has two neighbours of each class among its four; those of class 1 are nearer.
    points = torch.tensor([0.0, 1.0, 2.0, -1.5, -3.0, 50.0, 60.0])
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0])
    found = tv.Activations(points[:, None, None], labels, ("a", "b"), (0,), SOURCE)
    score = tv.task_decodability(found, k=4).scores[0, 1]
    swapped = tv.Activations(-points[:, None, None] * 0.99, labels, ("a", "b"), (0,), SOURCE)
    assert float(score) == pytest.approx(float(tv.task_decodability(swapped, k=4).scores[0, 1]))
    nearer = points.clone()
    nearer[1], nearer[3] = 1.6, -0.1  # now the two of class 0 are nearer: 3.1 against 3.6
    moved = tv.Activations(nearer[:, None, None], labels, ("a", "b"), (0,), SOURCE)
    assert float(tv.task_decodability(moved, k=4).scores[0, 1]) < float(score)


@pytest.mark.parametrize("value", [0.0, 7.3])
@pytest.mark.parametrize("k", [5, 10])
def test_equal_points_tell_nothing_in_whatever_order_they_stand(k: int, value: float) -> None:
    labels = torch.arange(3).repeat_interleave(60)
    points = torch.full((180, 1, 4), value)
    for order in (torch.arange(180), torch.arange(180).view(3, 60).T.flatten()):
        found = tv.Activations(points, labels[order], ("a", "b", "c"), (0,), SOURCE)
        scores = tv.task_decodability(found, k).scores
        assert float(scores.min()) > 0.15 and float(scores.max()) < 0.55
        assert float(scores.mean()) == pytest.approx(1 / 3, abs=0.1)


def test_separated_tasks_score_one_and_arbitrary_labels_score_chance() -> None:
    far = tv.task_decodability(activations(120, 4, spread=100.0))
    assert torch.equal(far.scores, torch.ones(2, 4))
    none = tv.task_decodability(activations(1200, 4, spread=0.0))
    assert float(none.mean.mean()) == pytest.approx(none.chance, abs=0.03)


def test_the_best_layer_has_the_highest_mean() -> None:
    found = activations(120, 3, layers=3, spread=0.3)
    found.values[:, 1] += 100 * found.labels[:, None]
    result = tv.task_decodability(found)
    assert result.best_layer() == 1
    assert torch.equal(result.at(1), result.scores[1])
    assert len(result.to_frame()) == 9


def test_pairwise_scores_equal_those_of_the_two_tasks_alone() -> None:
    found = activations(90, 3, spread=0.7)
    matrix = tv.task_decodability(found).pairwise(1)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        rows = (found.labels == first) | (found.labels == second)
        labels = (found.labels[rows] == second).long()
        pair = tv.Activations(found.values[rows], labels, ("a", "b"), (0, 1), SOURCE)
        expected = tv.task_decodability(pair).scores[1]
        assert float(matrix[first, second]) == pytest.approx(float(expected[0]))
        assert float(matrix[second, first]) == pytest.approx(float(expected[1]))
    assert torch.isnan(matrix.diagonal()).all()


@pytest.mark.parametrize("k", [0, 30, 31])
def test_k_that_leaves_nobody_to_vote_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k} and there are 30 points"):
        tv.task_decodability(activations(30, 3), k=k)


def test_one_task_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="two tasks or more"):
        tv.task_decodability(activations(30, 1))


def test_the_null_is_what_permuted_labels_score() -> None:
    found = activations(60, 3)
    null = tv.task_decodability(found, k=5).null(n_permutations=20, seed=1)
    generator = torch.Generator().manual_seed(1)
    for row in range(3):
        labels = found.labels[torch.randperm(60, generator=generator)]
        again = tv.Activations(found.values, labels, found.tasks, found.layers, SOURCE)
        torch.testing.assert_close(null.permuted[row], tv.task_decodability(again, k=5).mean)
    assert null.permuted.shape == (20, 2) and null.band().shape == (2, 2)


def test_p_values_tell_separated_tasks_from_arbitrary_labels() -> None:
    apart = tv.task_decodability(activations(90, 3, spread=5.0)).null(200)
    same = tv.task_decodability(activations(90, 3, spread=0.0)).null(200)
    assert apart.p_value == pytest.approx(1 / 201)
    assert apart.p_values.tolist() == pytest.approx([1 / 201] * 2)
    assert same.p_value > 0.05 and "p = " in repr(same)
    assert same.band()[0].max() < 1 / 3 < same.band()[1].min()


def test_intervals_hold_the_scores() -> None:
    found = tv.task_decodability(activations(120, 3, spread=0.7))
    interval = found.interval(1)
    assert (interval[:, 0] <= found.at(1)).all() and (found.at(1) <= interval[:, 1]).all()
    assert (interval[:, 1] - interval[:, 0] > 0.02).all()
    for right, ends in zip(found.at(1) * found.n, interval, strict=True):
        wilson = proportion_confint(round(float(right)), 40, method="wilson")
        assert ends.tolist() == pytest.approx(wilson, abs=1e-5)
    certain = tv.task_decodability(activations(120, 3, spread=100.0))
    assert certain.at(1).tolist() == [1, 1, 1] and (certain.interval(1)[:, 0] < 0.95).all()
    scores = tv.task_decodability(activations(120, 3, spread=0.7), method="divergence")
    assert (scores.interval(1)[:, 0] < scores.at(1)).all()
    assert (scores.at(1) < scores.interval(1)[:, 1]).all()


def test_a_frame_carries_intervals() -> None:
    found = tv.task_decodability(activations(120, 3, spread=0.7))
    frame = found.to_frame()
    assert list(frame) == ["layer", "task", "td", "low", "high", "n", "n_distinct", "k"]
    assert ((frame.low <= frame.td) & (frame.td <= frame.high)).all()


def test_the_best_of_many_layers_of_noise_is_not_believed() -> None:
    too_high, held_out = [], []
    for seed in range(10):
        found = activations(90, 3, layers=30, spread=0.0)
        order = torch.randperm(90, generator=torch.Generator().manual_seed(seed))
        noise = tv.task_decodability(dataclasses.replace(found, labels=found.labels[order]))
        too_high.append(float(noise.mean.max()) - noise.chance)
        held_out.append(noise.held_out - noise.chance)
    assert min(too_high) > 0.05 and sum(too_high) / 10 > 0.09
    assert abs(sum(held_out)) / 10 < 0.04
    assert f"{noise.held_out:.3f} on points it was not chosen on" in repr(noise)
    assert tv.task_decodability(activations(120, 3, spread=100.0)).held_out == 1.0


@pytest.mark.parametrize("method", ["cosine", "centroid", "linear", "divergence"])
def test_every_method_tells_separated_tasks_from_arbitrary_labels(method: str) -> None:
    far = tv.task_decodability(activations(120, 4, spread=100.0), method=method)
    assert far.mean.min() > (0.85 if method == "divergence" else 0.999)
    none = tv.task_decodability(activations(600, 3, spread=0.0), method=method)
    assert float(none.mean.mean()) <= none.chance + 0.04
    assert method == "divergence" or float(none.mean.mean()) >= none.chance - 0.06
    assert method in repr(far)


def test_the_nearest_mean_is_of_the_others() -> None:
    found = activations(30, 3, spread=1.0)
    hits = tv.task_decodability(found, k=5, method="centroid").hits[0]
    points, labels = found.values[:, 0], found.labels
    for row in range(30):
        rest = torch.arange(30) != row
        means = torch.stack([points[rest & (labels == task)].mean(dim=0) for task in range(3)])
        nearest = int((means - points[row]).norm(dim=1).argmin())
        assert bool(hits[row]) == (nearest == int(labels[row]))


def test_divergence_is_in_bits_of_the_task_where_neighbours_are_sure() -> None:
    sure = tv.task_decodability(activations(120, 4, spread=100.0), method="divergence")
    expected = torch.tensor((10 + 1 / 4) / 11 * 4).log() / torch.tensor(4.0).log()
    torch.testing.assert_close(sure.scores, expected.expand(2, 4))
    half = activations(160, 4, spread=0.0)
    half.values[:, :] += 1_000.0 * (half.labels // 2)[:, None, None]  # two pairs, alike within
    found = tv.task_decodability(half, method="divergence")
    assert 0.3 < float(found.mean.mean()) < 0.5


def test_a_method_of_ones_own() -> None:
    def sign(points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (points[:, 0] > 0).long() == labels

    found = activations(40, 2)
    mine = tv.task_decodability(found, method=sign)
    expected = sign(found.values[:, 1], found.labels).float()
    assert torch.equal(mine.hits[1], expected) and "sign" in repr(mine)
    null = mine.null(50)
    assert null.permuted.shape == (50, 2) and 0.3 < float(null.permuted.mean()) < 0.7
    with pytest.raises(ValueError, match="method is 'svm'"):
        tv.task_decodability(found, method="svm")


def test_sensitivity_in_one_call() -> None:
    found = activations(120, 3, spread=0.7)
    frame = tv.analysis.decodability_sensitivity(found, ks=(1, 5, 40), ns=(10, 40), layer=1)
    assert set(frame.method) == {"knn", "centroid", "cosine"}
    whole = frame[(frame.method == "knn") & (frame.k == 5) & (frame.n == 40)].td.item()
    assert whole == pytest.approx(float(tv.task_decodability(found, 5).at(1).mean()))
    # Ten points a task are too few for 40 neighbours; the nearest mean has none to count.
    assert len(frame) == 2 * 2 + 1 + 2 * 3 + 1
    with pytest.raises(ValueError, match="between 2 and 40"):
        tv.analysis.decodability_sensitivity(found, ns=(41,))


def from_all_distances(points: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest neighbours by one matrix of all distances and one of noise for ties."""
    some = points[:: max(1, len(points) // 64)]
    centred = points.double() - some.median(dim=0).values.double()
    squares = centred.square().sum(dim=1)
    squared = (squares[:, None] + squares - 2 * centred @ centred.T).clamp(min=0)
    noise = torch.rand(squared.shape, generator=torch.Generator().manual_seed(0)).double()
    apart = squared.sqrt() + noise * (1e-7 * squares.sqrt() + 1e-30)[:, None]
    nearest = apart.fill_diagonal_(float("inf")).topk(k, largest=False)
    return nearest.values, nearest.indices


@pytest.mark.parametrize("at_once", [2**22, 700, 123_456, 1])
@pytest.mark.parametrize("equal", [False, True])
def test_neighbours_some_rows_at_a_time_are_those_of_the_whole_matrix(
    at_once: int, equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = activations(700, 7).values[:, 0]
    if equal:  # ties are ordered by chance, and by the same chance
        points[::3] = points[0]
    expected, order = from_all_distances(points, 10)
    monkeypatch.setattr(classifiers, "_DISTANCES_AT_ONCE", at_once)
    nearest, others = classifiers.neighbours(points, 10)
    if at_once == 2**22:
        assert torch.equal(others, order) and torch.equal(nearest, expected)
    if not equal:
        assert torch.equal(others, order)
    torch.testing.assert_close(nearest, expected, atol=3e-7, rtol=1e-7)


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.entries = max([self.entries, *sizes])
        return made


@pytest.mark.parametrize("method", ["knn", "cosine", "centroid", "divergence"])
def test_no_matrix_of_all_distances_is_made(method: str) -> None:
    found = activations(3_000, 3, layers=1)
    with LargestTensor() as largest:
        result = tv.task_decodability(found, method=method)
        if method == "knn":
            result.null(3)
    assert largest.entries < 3_000**2 / 2


MEMORY = """
import torch
import transformer_lens_taskvec as tv
from transformer_lens_taskvec.activations import Source

def found(n):
    values = torch.randn(n, 1, 576, generator=torch.Generator().manual_seed(0))
    source = Source("made", "resid_post", -1, "{x}->{y}", False)
    return tv.Activations(values, torch.arange(n) % 7, tuple("abcdefg"), (0,), source)

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

few, many = found(100), found(20_000)
tv.task_decodability(few).null(3)
before = peak()
tv.task_decodability(many).null(20)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_twenty_thousand_points_fit_in_500_mb() -> None:
    command = [sys.executable, "-W", "ignore", "-c", MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 500


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_are_refused(value: float) -> None:
    found = activations(90, 3)
    found.values[4, 1, 2] = value
    message = r"NaN or infinite values at layers \[1\], in 1 of 90 examples"
    for method in ("knn", "centroid", "linear", lambda points, labels: labels.float()):
        with pytest.raises(ValueError, match=message):
            tv.task_decodability(found, method=method)
    with pytest.raises(ValueError, match=message):
        tv.analysis.decodability_sensitivity(found, ks=(3,))
    with pytest.raises(ValueError, match=message):
        tv.plot_embedding(found, 1, method="pca")


def test_a_task_with_too_few_points_for_a_majority_is_warned_about(
    recwarn: pytest.WarningsRecorder,
) -> None:
    found = activations(90, 3, spread=100.0)
    six = dataclasses.replace(found, values=found.values[:63], labels=found.labels[:63].clone())
    six.labels[six.labels == 2] = 0
    six.labels[:6] = 2
    with pytest.warns(UserWarning, match="'task2' has 6 point.*a majority of k=10.*takes 6 others"):
        tv.task_decodability(six, 10)
    recwarn.clear()
    tv.task_decodability(six, 9)  # five others are a majority of nine
    tv.task_decodability(six, 10, method="centroid")
    assert not [one for one in recwarn.list if "majority" in str(one.message)]


def labelled_points(points: torch.Tensor, labels: torch.Tensor) -> tv.Activations:
    names = tuple(f"task{i}" for i in range(int(labels.max()) + 1))
    return tv.Activations(points[:, None], labels, names, (0,), SOURCE)


@pytest.mark.parametrize("offset", [0.0, 3_000.0, 30_000.0])
def test_the_nearest_mean_is_found_far_from_the_origin(offset: float) -> None:
    found = activations(90, 3, layers=1, offset=offset)
    hits = tv.task_decodability(found, method="centroid").hits[0]
    points, labels = found.values[:, 0].double(), found.labels
    for row in range(90):
        rest = torch.arange(90) != row
        means = torch.stack([points[rest & (labels == task)].mean(dim=0) for task in range(3)])
        assert bool(hits[row]) == (int((means - points[row]).norm(dim=1).argmin()) == labels[row])


@pytest.mark.parametrize("value", [0.1, 1.0])
def test_means_of_equal_points_tell_nothing(value: float) -> None:
    found = labelled_points(torch.full((240, 6), value), torch.arange(240) % 3)
    assert tv.task_decodability(found, method="centroid").scores.max() < 0.6


def test_directions_of_tiny_activations_are_told_apart() -> None:
    found = activations(90, 3, layers=1)
    tiny = dataclasses.replace(found, values=found.values * 1e-21)
    hits, small = (tv.task_decodability(of, 5, method="cosine").hits for of in (found, tiny))
    assert (hits == small).float().mean() > 0.97


def test_an_outlier_does_not_order_the_neighbours_of_others() -> None:
    found = activations(90, 3, layers=1)
    far = found.values.clone()
    far[0] += 1e7
    _, alone = classifiers.neighbours(found.values[1:, 0], 5)
    _, beside = classifiers.neighbours(far[:, 0], 5)
    assert torch.equal(beside[1:] - 1, alone)


def test_divergence_is_nothing_where_unequal_tasks_are_not_told_apart() -> None:
    points = torch.randn(600, 6, generator=torch.Generator().manual_seed(0))
    labels = (torch.arange(600) % 4 == 0).long()
    scores = tv.task_decodability(labelled_points(points, labels), 10, method="divergence").scores
    assert scores.max() < 0.1  # three quarters of the votes would be 0.58 of a bit


@pytest.mark.parametrize("method", ["knn", "cosine", "linear"])
def test_unequal_tasks_are_warned_about_where_votes_favour_the_larger(
    method: str, recwarn: pytest.WarningsRecorder
) -> None:
    points = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    labels = (torch.arange(100) < 12).long()
    with pytest.warns(UserWarning, match="88 of 'task0', 12 of 'task1'.*more points are decoded"):
        tv.task_decodability(labelled_points(points, labels), method=method)
    recwarn.clear()
    tv.task_decodability(labelled_points(points, labels), method="divergence")
    tv.task_decodability(labelled_points(points, (torch.arange(100) < 34).long()), method=method)
    assert not recwarn.list


def test_intervals_of_decodability_count_distinct_queries() -> None:
    found = activations(120, tasks=3)
    plain = tv.task_decodability(found)
    assert plain.n.tolist() == plain.n_distinct.tolist() == [40, 40, 40]
    queries = torch.arange(120) // 15  # eight of each task, in five prompts each
    again = tv.task_decodability(dataclasses.replace(found, queries=queries))
    assert again.n_distinct.tolist() == [8, 8, 8]
    torch.testing.assert_close(again.scores, plain.scores)
    low, high = again.interval(0)[0].tolist()
    share = float(again.scores[0, 0])
    assert (low, high) == pytest.approx(proportion_confint(share * 8, 8, method="wilson"), abs=1e-4)
    assert (again.to_frame().n_distinct == 8).all()
    with pytest.warns(UserWarning, match="distinct queries; p-values"):
        again.null(9)


def test_the_chosen_layer_is_no_better_than_chance_on_the_points_that_did_not_choose_it() -> None:
    generator = torch.Generator().manual_seed(0)
    gains = []
    for _ in range(200):
        values = torch.randn(20, 24, 32, generator=generator)
        labels = torch.arange(20) % 2
        noise = tv.Activations(values, labels, ("a", "b"), tuple(range(24)), SOURCE)
        found = tv.task_decodability(noise, 5)
        gains.append(found.held_out - float(found.mean.mean()))  # above any one layer's
    assert abs(sum(gains) / len(gains)) < 0.035


@pytest.mark.parametrize("method", ["knn", "centroid", "divergence"])
def test_a_permutation_that_changes_nothing_scores_as_high(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in range(9, 60):
        points = torch.randn(n, 5, generator=generator)
        found = tv.task_decodability(labelled_points(points, torch.arange(n) % 3), 4, method=method)
        same = found.activations.labels[None]
        again = under_permuted(points, same, method, 4, None)
        null = tv.analysis.DecodabilityNull(found.mean, again[None], (0,))
        assert null.p_value == 1.0 and float(null.p_values) == 1.0


def test_sensitivity_leaves_out_a_k_without_a_majority() -> None:
    frame = tv.analysis.decodability_sensitivity(
        activations(120, tasks=3), ks=(15, 20), ns=(10, 40), methods=("knn",), layer=1
    )
    assert list(zip(frame.n, frame.k, strict=True)) == [(10, 15), (40, 15), (40, 20)]


def shared(values: torch.Tensor, sets: torch.Tensor, tasks: int) -> tv.Activations:
    """Activations ``[point, layer, d]`` whose sets of demonstrations are of each task in turn."""
    names = tuple("abcdefg"[:tasks])
    layers, queries = tuple(range(values.shape[1])), torch.arange(len(sets))
    return tv.Activations(values, sets % tasks, names, layers, SOURCE, queries, sets)


def test_prompts_that_share_demonstrations_are_refused_unless_those_of_a_set_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    sets = torch.arange(30).repeat_interleave(8)  # near each other by set, and not by task
    values = torch.randn(30, 2, 6, generator=generator)[sets]
    values = values + 0.2 * torch.randn(240, 2, 6, generator=generator)
    found = shared(values, sets, 3)
    with pytest.raises(ValueError, match=r"240 prompts share 30 sets .* leave_out_sets=True"):
        tv.task_decodability(found)
    with pytest.raises(ValueError, match="share 30 sets"):
        tv.analysis.decodability_sensitivity(found)
    for method in ("knn", "cosine"):
        artefact = tv.task_decodability(dataclasses.replace(found, demo_sets=None), method=method)
        left = tv.task_decodability(found, method=method, leave_out_sets=True)
        assert artefact.mean.min() > 0.95 and left.mean.max() < 0.55
        assert artefact.held_out > 0.6 > left.held_out
        assert left.pairwise(0).nan_to_num(0).max() < 0.85
    divergence = tv.task_decodability(found, method="divergence", leave_out_sets=True)
    assert divergence.mean.max() < 0.1
    with pytest.raises(ValueError, match="permuted labels take prompts to be independent"):
        left.null()
    for method in ("centroid", "linear", lambda points, labels: labels == 0):
        with pytest.raises(ValueError, match="cannot leave out the prompts that share"):
            tv.task_decodability(found, method=method, leave_out_sets=True)
    with pytest.raises(ValueError, match="nor do those of its set: at most 232"):
        tv.task_decodability(found, k=233, leave_out_sets=True)
    alone = shared(values[::8], sets[::8], 3)  # one prompt per set shares nothing
    assert tv.task_decodability(alone, k=3).scores.shape == (2, 3)


def test_neighbours_of_the_same_set_never_vote() -> None:
    found = activations(90, 3)
    sets = torch.arange(90) % 15
    left = tv.task_decodability(
        dataclasses.replace(found, demo_sets=sets), k=7, leave_out_sets=True
    )
    for layer in range(2):
        points = found.values[:, layer].double()
        for row in range(0, 90, 7):
            others = torch.where(sets != sets[row])[0]
            fitted = KNeighborsClassifier(n_neighbors=7).fit(points[others], found.labels[others])
            share = fitted.predict_proba(points[row : row + 1])[0]
            if int((share == share.max()).sum()) == 1:
                assert bool(left.hits[layer, row]) == (share.argmax() == int(found.labels[row]))
    widths = [
        of.interval(1)[:, 1] - of.interval(1)[:, 0]
        for of in (left, tv.task_decodability(found, k=7))
    ]
    assert (widths[0] > widths[1]).all()


@pytest.mark.filterwarnings("ignore:.*demo_sets is 4")
def test_a_task_without_a_rule_is_decoded_only_because_prompts_share_demonstrations(
    smollm2: Any,
) -> None:
    tasks = tv.bitwise_tasks()
    some = [tasks[name] for name in ("XOR", "XNOR", "Null")]
    found = {
        demo_sets: tv.collect(
            smollm2,
            tv.sample_episodes(some, 40, 4, seed=0, demo_sets=demo_sets),
            layers=[20],
        )
        for demo_sets in (None, 4)
    }
    fresh = tv.task_decodability(found[None]).at(20)
    as_if_fresh = tv.task_decodability(dataclasses.replace(found[4], demo_sets=None)).at(20)
    left_out = tv.task_decodability(found[4], leave_out_sets=True).at(20)
    assert fresh[2] < 0.5 and as_if_fresh[2] > 0.85 and left_out[2] < 0.5
    assert as_if_fresh.min() > 0.8 > max(fresh.max(), left_out.max())
    with pytest.warns(UserWarning, match="120 prompts that share 12 sets of demonstrations"):
        tv.task_vectors(found[4])
