"""Task decodability (TD): how well the task can be decoded from the representation.

The representations of all tasks are pooled. Each point is classified by the majority vote of its k
nearest neighbours (Euclidean, itself left out). The TD of a task is the share of its points
classified correctly (Han et al. 2025, section 4; N = 100 points per task, k = 10), at every layer.
TD is meaningful only over tasks whose inputs look alike.

Prompts that share their demonstrations are each other's neighbours whatever the task, so that even
a task without a rule is decoded. They are refused, unless such neighbours are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import pandas as pd
import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_taskvec._utils.frames import grid_frame
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import (
    change_interval,
    cross_fitted_best,
    means_by_query,
    numbered,
    share_interval,
)
from transformer_lens_taskvec.activations import Activations, check_finite, layer_index
from transformer_lens_taskvec.analysis.classifiers import (
    BY_INPUT,
    WITH_NEIGHBOURS,
    Readout,
    readout,
    readout_name,
)
from transformer_lens_taskvec.analysis.permuted import (
    ROUNDING,
    DecodabilityNull,
    permuted_labels,
    under_permuted,
)
from transformer_lens_taskvec.analysis.points import (
    check_k,
    check_left_out,
    flat,
    n_others,
    shared_sets,
    warn_of_repeats,
    warn_of_small_tasks,
    warn_of_unequal_tasks,
)
from transformer_lens_taskvec.analysis.retrieval import by_chance, on_shared_inputs

_BY_MAJORITY = ("knn", "cosine", "linear")
"""The methods that favour tasks with more points."""


@dataclass(frozen=True, repr=False)
class Decodability(Shown):
    """Task decodability by layer and task.

    Attributes:
        hits: ``[layer, point]``, the method's score of each point: 1 where it is classified
            correctly, else 0; for ``"retrieval"`` one over a rank.
        activations: What it was computed from; for ``"retrieval"`` the points whose inputs all
            tasks are asked.
        k: The number of neighbours that vote.
        method: ``"knn"``, the name of another method, or a function.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> found = tv.task_decodability(tv.collect(tv.load_model("toy"), episodes))
        >>> found.scores.shape, round(found.chance, 2)  # [layer, task]
        (torch.Size([4, 6]), 0.17)
    """

    hits: Float[Tensor, "layer point"]
    activations: Activations
    k: int
    method: str | Readout = "knn"

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.activations.tasks

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, counted from 0."""
        return self.activations.layers

    @property
    def n(self) -> Int[Tensor, " task"]:
        """``[task]``, the number of points of each task."""
        return torch.bincount(self.activations.labels, minlength=len(self.tasks))

    @property
    def scores(self) -> Float[Tensor, "layer task"]:
        """``[layer, task]``, the share of the task's points classified correctly.

        It is a mean over distinct queries, of each query's mean.
        """
        return torch.stack([own.mean(dim=1) for own in self._by_task()], dim=1)

    @property
    def n_distinct(self) -> Int[Tensor, " task"]:
        """``[task]``, the number of distinct queries of each task."""
        return torch.tensor([own.shape[1] for own in self._by_task()])

    @property
    def mean(self) -> Float[Tensor, " layer"]:
        """The mean over tasks, by layer."""
        return reduce(self.scores, "layer task -> layer", "mean")

    def best_layer(self, task: str | None = None) -> int:
        """Return the first layer with the highest TD of a task, or of the mean over tasks.

        Raises:
            ValueError: If there is no such task.
        """
        if task is not None and task not in self.tasks:
            raise ValueError(f"no task {task!r} here; there are: {', '.join(self.tasks)}")
        scores = self.mean if task is None else self.scores[:, self.tasks.index(task)]
        return self.layers[int((scores >= scores.max() - ROUNDING).int().argmax())]

    @cached_property
    def held_out(self) -> float:
        """The mean TD at the best layer, on points that the layer was not chosen on.

        The highest TD of many layers is biased upwards. Here half the queries of each task choose
        the layer and TD is measured on the other half; then the halves swap. The half that chooses
        is classified by itself, with half the neighbours: two points that are each other's
        neighbours are right or wrong together.
        """
        labels = self.activations.labels
        turn = torch.zeros_like(labels)
        for rows in (labels == task for task in range(len(self.tasks))):
            turn[rows] = numbered(self._units[rows]) % 2
        choosing = torch.stack([self._alone(turn == half) for half in (0, 1)])
        return float(cross_fitted_best(self._by_task(self._units), choosing))

    @property
    def chance(self) -> float:
        """The expected score of a method that ignores the representation."""
        if self._inputs is not None:
            return by_chance(self.activations.labels, self._inputs, recall=self.method == "recall")
        return 0.0 if self.method == "divergence" else 1 / len(self.tasks)

    def pairwise(self, layer: int) -> Float[Tensor, "task task"]:
        """Return the TD of each pair of tasks alone, at one layer (the paper's Figure 23).

        Returns:
            ``[task, task]``: row i, column j is the share of task i's points classified correctly
            against task j's; the diagonal is NaN.

        Raises:
            ValueError: If the layer was not collected, or a pair has k points or fewer.
        """
        points = flat(self.activations.at(layer))
        labels = self.activations.labels.to(points.device)
        matrix = torch.full((len(self.tasks), len(self.tasks)), float("nan"))
        for first, second in combinations(range(len(self.tasks)), 2):
            chosen = (labels == first) | (labels == second)
            if self._inputs is None:
                check_k(self.k, labels[chosen], self._groups(chosen))
            pair = (labels[chosen] == second).long()
            hits = self._method(self.k, chosen)(points[chosen], pair)
            matrix[first, second] = hits[pair == 0].float().mean()
            matrix[second, first] = hits[pair == 1].float().mean()
        return matrix

    def null(self, n_permutations: int = 1_000, seed: int = 0) -> DecodabilityNull:
        """Return the distribution of mean TD under permuted labels, at every layer.

        The permutations are the same at every layer; with ``"retrieval"`` they are among the points
        of each input. With ``"knn"`` and ``"retrieval"`` the neighbours are computed once; other
        methods run again for each permutation.

        Args:
            n_permutations: The number of permutations.
            seed: Seed of the permutations.

        Returns:
            The null distribution, with p-values.

        Raises:
            ValueError: If prompts share their demonstrations, and are not independent.

        Warns:
            UserWarning: If queries repeat: a query's prompts are near each other whatever the
                task, so that p-values are then too small.
        """
        if self._groups() is not None:
            raise ValueError(
                "these prompts share their demonstrations, and permuted labels take prompts to be "
                "independent. Use episodes with fresh demonstrations"
            )
        if bool((self.n_distinct < self.n).any()):
            warn_of_repeats(int(self.n.sum()), int(self.n_distinct.sum()))
        permuted = permuted_labels(self.activations.labels, self._inputs, n_permutations, seed)
        means = []
        for index in range(len(self.layers)):
            points = flat(self.activations.values[:, index])
            own = under_permuted(points, permuted, self.method, self.k, self._inputs)
            means.append(own.to(self.hits.device))
        rows = [self.activations.labels == task for task in range(len(self.tasks))]
        observed = torch.stack([self.hits[:, some].mean(dim=1) for some in rows]).mean(dim=0)
        return DecodabilityNull(observed, torch.stack(means, dim=1), self.layers)

    def interval(self, layer: int, confidence: float = 0.95) -> Float[Tensor, "task 2"]:
        """Return each task's interval at a layer, over its distinct queries.

        With shared demonstrations it is over their sets, too. It is Wilson's; for a method whose
        scores are not all 0 or 1, Student's with a correction for skewness.

        Raises:
            ValueError: If the layer was not collected.
        """
        return self._intervals(confidence)[layer_index(self.layers, layer)]

    @property
    def recall(self) -> Decodability:
        """The recall at 1: how often the nearest candidate is of the point's task.

        Raises:
            ValueError: If the method is not ``"retrieval"``.
        """
        if self._inputs is None:
            raise ValueError(
                f"method is {readout_name(self.method)!r}; recall at 1 is of method='retrieval'"
            )
        return replace(self, hits=(self.hits == 1).float(), method="recall")

    def at(self, layer: int) -> Float[Tensor, " task"]:
        """Return the scores at one layer."""
        return self.scores[layer_index(self.layers, layer)]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per layer and task.

        The columns are ``layer, task, td, low, high`` (95 %), ``n, n_distinct, k``; for
        ``"retrieval"``, where ``td`` is the mean reciprocal rank, ``recall`` in place of ``k``.
        """
        low, high = rearrange(self._intervals(), "layer task end -> end layer task")
        sizes = {"n": self.n, "n_distinct": self.n_distinct}
        columns = {"td": self.scores, "low": low, "high": high, **sizes}
        frame = grid_frame({"layer": self.layers, "task": self.tasks}, columns)
        if self.method == "retrieval":
            return frame.assign(recall=self.recall.scores.flatten().tolist())
        return frame.assign(k=self.k)

    def _alone(self, rows: Bool[Tensor, " point"]) -> Float[Tensor, " layer"]:
        """Return the mean TD, by layer, of some points by themselves."""
        values, labels = self.activations.values[rows], self.activations.labels[rows]
        fewest = n_others(labels, self._groups(rows))
        method = self._method(max(1, min((self.k + 1) // 2, fewest)), rows)
        there, layers = labels.to(values.device), range(values.shape[1])
        hits = torch.stack([method(flat(values[:, layer]), there).float() for layer in layers])
        means = torch.stack([hits[:, there == one].mean(dim=1) for one in there.unique()])
        return means.mean(dim=0)

    def _by_task(
        self, units: Int[Tensor, " point"] | None = None
    ) -> list[Float[Tensor, "layer unit"]]:
        units = self._queries if units is None else units
        rows = [self.activations.labels == task for task in range(len(self.tasks))]
        return [means_by_query(self.hits[:, own], units[own]).float() for own in rows]

    def _method(self, k: int, rows: Bool[Tensor, " point"]) -> Readout:
        """Return the method, to be applied to some points."""
        inputs = None if self._inputs is None else self._inputs[rows.to(self._inputs.device)]
        return readout(self.method, k, self._groups(rows), inputs)

    def _groups(self, rows: Bool[Tensor, " point"] | None = None) -> Int[Tensor, " chosen"] | None:
        """Return the sets of demonstrations of some points, or of all; None if none are shared."""
        sets = shared_sets(self.activations)
        return sets if sets is None or rows is None else sets[rows.to(sets.device)]

    @property
    def _inputs(self) -> Int[Tensor, " point"] | None:
        """The points' inputs if the method compares tasks on the same ones."""
        return self.activations.inputs if self.method in BY_INPUT else None

    @property
    def _units(self) -> Int[Tensor, " point"]:
        """What is halved to choose a layer: queries or inputs, or shared sets of demonstrations."""
        groups = self._groups() if self._inputs is None else self._inputs
        return self._queries if groups is None else groups

    @property
    def _queries(self) -> Int[Tensor, " point"]:
        queries = self.activations.queries
        return torch.arange(len(self.activations)) if queries is None else queries

    def _intervals(self, confidence: float = 0.95) -> Float[Tensor, "layer task 2"]:
        shares, found = bool(((self.hits == 0) | (self.hits == 1)).all()), []
        for task in range(len(self.tasks)):
            own = self.activations.labels == task
            given = self.hits[:, own], self._queries[own], self._groups(own), confidence
            ends = torch.stack(share_interval(*given), -1) if shares else change_interval(*given)
            found.append(ends.float())
        return torch.stack(found, dim=1)

    def __repr__(self) -> str:
        best = self.best_layer()
        per_task = ", ".join(
            f"{task} {score:.2f}"
            for task, score in zip(self.tasks, self.at(best).tolist(), strict=True)
        )
        how = f"k={self.k}" if self.method == "knn" else readout_name(self.method)
        return (
            f"Decodability(best layer {best}: mean {float(self.mean.max()):.3f}, "
            f"{self.held_out:.3f} on points it was not chosen on "
            f"(chance {self.chance:.3f}, {how}); {per_task})"
        )


def task_decodability(
    activations: Activations,
    k: int = 10,
    *,
    method: str | Readout = "knn",
    leave_out_sets: bool = False,
) -> Decodability:
    """Return how well the task can be decoded from the activations, by layer and task.

    - ``"knn"``: the paper's leave-one-out vote of the k nearest neighbours. A tie goes to the class
      whose neighbours are nearer: the one with the smaller sum of distances.
    - ``"cosine"``: the same with neighbours by angle.
    - ``"centroid"``: the class with the nearest mean, the point itself left out of its own.
    - ``"linear"``: a ridge classifier on standardised activations, in five-fold cross-validation,
      its regularisation chosen within each fold (extra ``probe``).
    - ``"divergence"``: an f-divergence in place of accuracy (the paper's Definition B.3): the
      Jensen-Shannon divergence between the tasks' distributions, divided by the logarithm of their
      number to lie between 0 and 1; a lower bound, estimated from the neighbours' labels.
    - ``"retrieval"``: the mean reciprocal rank of the first point of the same task among all
      others, on inputs that all tasks are asked: the other tasks' points with the point's own input
      are hard negatives (Zhang et al. 2024, CodeSage). Points of the same task and input are left
      out, and so are points whose inputs not all tasks are asked. ``.recall`` is the recall at 1,
      and ``"recall"`` measures it alone.
    - Your own function: ``(points [point, d], labels [point]) -> [point]`` scores, 1 for correct.

    A task with too few points to win a majority of the k votes is warned about, and so are tasks
    with unequal numbers of points where these decide.

    Args:
        activations: ``[example, layer, d_model]`` of at least two tasks, about 100 per task.
        k: The number of neighbours.
        method: How to classify the points.
        leave_out_sets: Whether episodes may share their demonstrations; then those of the point's
            own set are no neighbours of it. The point's task so has fewer candidates than the
            others, and TD is a little too low: with 10 sets per task, as if a tenth of its points
            were missing. Only for methods with neighbours.

    Raises:
        ValueError: If there is only one task, the method is unknown, an activation is NaN or
            infinite, ``k`` is not between 1 and the number of points that can vote, or episodes
            share their demonstrations and ``leave_out_sets`` is not given or not possible, or the
            tasks share fewer than two inputs for ``"retrieval"``.
        ImportError: If ``"linear"`` is asked for and scikit-learn is not installed.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 20, 4, seed=0)
        >>> found = tv.task_decodability(tv.collect(model, episodes))
        >>> found.mean.shape, found.best_layer(), round(float(found.mean.max()), 1)
        (torch.Size([4]), 1, 1.0)
        >>> tv.task_decodability(tv.collect(model, episodes), method="centroid").best_layer()
        1
    """
    labels = activations.labels
    if len(activations.tasks) < 2:
        raise ValueError(
            f"decodability takes two tasks or more to tell apart; got {list(activations.tasks)}"
        )
    check_finite(activations)
    groups = shared_sets(activations)
    if groups is not None:
        check_left_out(groups, method, leave_out_sets)
    inputs = None
    if method in BY_INPUT:
        activations = on_shared_inputs(activations)
        labels, inputs = activations.labels, activations.inputs
    else:
        check_k(k, labels, groups)
    of_points = readout(method, k, groups, inputs)
    if method in WITH_NEIGHBOURS:
        warn_of_small_tasks(activations, k)
    if method in _BY_MAJORITY:
        warn_of_unequal_tasks(activations)
    n_layers, there = len(activations.layers), labels.to(activations.values.device)
    hits = [of_points(flat(activations.values[:, index]), there) for index in range(n_layers)]
    return Decodability(torch.stack(hits).to(labels.device).float(), activations, k, method)
