"""How tasks separate over training, and how the model comes to use that.

``measure_emergence(run)`` gives, at every checkpoint of a run, the error of each task, task
decodability (TD) at every layer, the effect of swapping the tasks' representations on the error,
and the distance of the model's predictions from each oracle's (Han et al. 2025, Figures 2 to 7).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.atomic_io import write_text
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import collect
from transformer_lens_taskvec.analysis.classifiers import neighbours
from transformer_lens_taskvec.analysis.decodability import task_decodability
from transformer_lens_taskvec.analysis.perturbation import PerturbationMatrix, matrix_of_edits
from transformer_lens_taskvec.interventions.intervention import Intervention, inject
from transformer_lens_taskvec.lab.episodes import LabEpisode, problem_episodes
from transformer_lens_taskvec.lab.evaluation import OracleErrors, checked_oracles, oracle_errors
from transformer_lens_taskvec.lab.problems.base import Batch, balanced_labels
from transformer_lens_taskvec.lab.training.on_problem import Run
from transformer_lens_taskvec.vectors.means import task_vectors

if TYPE_CHECKING:
    import pandas as pd

_TRAIN, _CHOOSE, _TEST, _ORACLE = 11, 12, 13, 14


@dataclass(frozen=True, repr=False)
class Emergence(Shown):
    """What the checkpoints of a run show.

    Attributes:
        steps: The checkpoints.
        tasks: The latent tasks.
        loss: Mean loss, ``[checkpoint, task, point]``; squared errors, unless the problem has
            another.
        td: TD at the query token, ``[checkpoint, layer, task]``.
        swaps: For each checkpoint, the change in the query's squared error when each task's
            representation is replaced by each other task's; see :func:`swap_matrix`.
        oracles: The oracles' own errors.
        oracle_distance: The mean distance between the model's predictions and each oracle's over
            the late points, ``[checkpoint, oracle]``: squared differences, unless the problem has
            another.
        n_shots: Demonstrations before the query, for ``td`` and ``swaps``.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> found = lab.measure_emergence(run, steps=[26000], n=11, n_oracle=20, progress=False)
        >>> ratio = found.swap_ratio[-1]  # [source, target]
        >>> bool(ratio[0, 0] < ratio[0, 1])  # B1's own mean does less harm than B2's
        True
    """

    steps: tuple[int, ...]
    tasks: tuple[str, ...]
    loss: Float[Tensor, "checkpoint task point"]
    td: Float[Tensor, "checkpoint layer task"]
    swaps: tuple[PerturbationMatrix, ...]
    oracles: OracleErrors
    oracle_distance: Float[Tensor, "checkpoint oracle"]
    n_shots: int

    @property
    def loss_kind(self) -> str:
        """What the losses are, as ``Scores.loss_kind``."""
        return self.swaps[-1].baseline.loss_kind

    @property
    def late_loss(self) -> Float[Tensor, "checkpoint task"]:
        """The mean loss over the late points."""
        return self.loss[..., self.oracles.late_from :].nanmean(-1)

    def best_layer(self, task: str | None = None) -> int:
        """The layer with the highest TD of a task, or of the mean over tasks, in the end.

        Raises:
            ValueError: If there is no such task.
        """
        if task is not None and task not in self.tasks:
            raise ValueError(f"no task {task!r} here; there are: {', '.join(self.tasks)}")
        last = self.td[-1]
        scores = last.mean(-1) if task is None else last[:, self.tasks.index(task)]
        return int(scores.argmax())

    @property
    def swap_ratio(self) -> Float[Tensor, "checkpoint source target"]:
        """The query's squared error with a swapped representation, divided by that without."""
        ratios = []
        for swap in self.swaps:
            before = torch.tensor([[swap.baseline.of(task).mean_loss] for task in swap.sources])
            ratios.append(1 + swap.delta_loss.float() / before)
        return torch.stack(ratios)

    @property
    def td_loss_correlation(self) -> float:
        """Spearman's rank correlation between mean TD and mean late error over checkpoints.

        NaN where one of them is the same at all checkpoints.
        """
        return _rank_correlation(self.td[:, self.best_layer()].mean(-1), self.late_loss.mean(-1))

    def to_frame(self) -> pd.DataFrame:
        """One row per checkpoint and task.

        Columns ``step, task, late_loss, td`` (at the best layer), ``td_layer_0`` and so on,
        ``own_swap`` and ``other_swap``: the ratio of the errors with and without a swap, for the
        task's own mean, and averaged over the other tasks' means.
        """
        import pandas as pd

        off = ~torch.eye(len(self.tasks), dtype=torch.bool)
        rows = []
        for index, step in enumerate(self.steps):
            ratio = self.swap_ratio[index]
            for column, task in enumerate(self.tasks):
                by_layer = self.td[index, :, column].tolist()
                rows.append(
                    {
                        "step": step,
                        "task": task,
                        "late_loss": float(self.late_loss[index, column]),
                        "td": by_layer[self.best_layer()],
                        **{f"td_layer_{layer}": td for layer, td in enumerate(by_layer)},
                        "own_swap": float(ratio[column, column]),
                        "other_swap": float(ratio[column][off[column]].mean()),
                    }
                )
        return pd.DataFrame(rows)

    def save(self, folder: str | Path) -> Path:
        """Write ``emergence.json`` to a folder and return its path."""
        path, names = Path(folder) / "emergence.json", self.oracles.names
        described: dict[str, Any] = {
            "tasks": self.tasks,
            "n_shots": self.n_shots,
            "best_layer": self.best_layer(),
            "swap_layer": self.swaps[-1].layer,
            "td_loss_correlation": self.td_loss_correlation,
            "oracle_late_loss": {name: self.oracles.late(name) for name in names},
            "oracle_distance": dict(zip(names, self.oracle_distance.T.tolist(), strict=True)),
            "swap_ratio": self.swap_ratio[-1].tolist(),
            "checkpoints": json.loads(self.to_frame().to_json(orient="records")),
        }
        write_text(path, json.dumps(described, indent=1) + "\n")
        return path

    def __repr__(self) -> str:
        ratio, own = self.swap_ratio[-1], torch.eye(len(self.tasks), dtype=torch.bool)
        late, layer, best = self.late_loss.mean(-1), self.best_layer(), self.oracles.best
        td = self.td[:, layer].mean(-1)
        return (
            f"Emergence({len(self.steps)} checkpoints to step {self.steps[-1]}: late loss "
            f"{late[0]:.3f} -> {late[-1]:.4f} ({best} {self.oracles.late(best):.4f}), "
            f"TD at layer {layer} {td[0]:.2f} -> {td[-1]:.2f}, "
            f"rank correlation {self.td_loss_correlation:.2f}; "
            f"a swap at layer {self.swaps[-1].layer} multiplies the error by "
            f"{ratio[own].mean():.2f} (own mean) and {ratio[~own].mean():.1f} (another's))"
        )


def measure_emergence(
    run: Run,
    *,
    steps: Sequence[int] | None = None,
    n: int = 100,
    k: int = 10,
    n_shots: int | None = None,
    swap_layer: int | None = None,
    n_oracle: int = 2_000,
    seed: int = 0,
    progress: bool = True,
) -> Emergence:
    """Measure every checkpoint of a run (Han et al. 2025, sections 3.3 and App. E).

    Args:
        run: From :func:`train` or :func:`load_run`.
        steps: The checkpoints to measure; by default all of them.
        n: Sequences per task, separately for TD and swaps, for the means, and for choosing the
            layer of the swaps.
        k: Neighbours that vote in TD.
        n_shots: Demonstrations before the query; by default all that a sequence has.
        swap_layer: The layer of the swaps; by default the one at which, at the last checkpoint and
            on separate sequences, another task's mean harms most compared with the task's own.
        n_oracle: Sequences for the oracles' errors.
        seed: Seed of all sequences.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the run is not on a problem, or has no checkpoint at one of the steps.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> found = lab.measure_emergence(run, steps=[26000], n=11, n_oracle=20, progress=False)
        >>> found.td.shape, found.best_layer()  # [checkpoint, layer, task]
        (torch.Size([1, 5, 4]), 4)
    """
    problem = getattr(run.config, "problem", None)
    if problem is None:
        raise ValueError(f"{run.path} holds a {type(run).__name__}; give a run on a problem")
    run.checkpoint()  # raises if there is none
    chosen = tuple(map(run.checkpoint, run.steps if steps is None else steps))

    def episodes(kind: int) -> list[LabEpisode]:
        return problem_episodes(problem, n, n_shots, seed=1_000 * seed + kind)

    train, test = episodes(_TRAIN), episodes(_TEST)
    labels = balanced_labels(len(problem.tasks), 250)
    generator = torch.Generator().manual_seed(1_000 * seed + _ORACLE)
    batch = problem.sample(len(labels), generator, labels=labels)
    predictions = checked_oracles(problem, batch)
    if swap_layer is None:
        swap_layer = _swap_layer(run.model(chosen[-1]), train, episodes(_CHOOSE))
    td, swaps, distances = [], [], []
    for step in tqdm(chosen, disable=not progress, leave=False, desc="checkpoints"):
        model = run.model(step)
        td.append(task_decodability(collect(model, test), k=k).scores)
        swaps.append(swap_matrix(model, train, test, swap_layer))
        with torch.no_grad():
            predicted = problem.predict(model.run_with_hooks, batch)
        apart = [problem.distance(predicted, of) for of in predictions.values()]
        distances.append([_late_mean(one, batch, problem.late_from) for one in apart])
    return Emergence(
        chosen,
        problem.tasks,
        run.loss[[run.steps.index(step) for step in chosen]],
        torch.stack(td),
        tuple(swaps),
        oracle_errors(problem, n_sequences=n_oracle),
        torch.tensor(distances),
        test[0].n_shots,
    )


def swap_matrix(
    model: Any,
    train: Sequence[LabEpisode],
    test: Sequence[LabEpisode],
    layer: int,
) -> PerturbationMatrix:
    """Return the change in the query's error when a task's representation is replaced by another's.

    The paper replaces activations by a task's mean (Figure 7). Here the mean replaces only the
    component in the subspace in which the tasks' means differ, so that the numbers of the sequence
    are kept. It does so at the tokens that ``Problem.swapped_at`` names, by default those of the
    outputs ``y`` in the second half of the demonstrations, each with means of its own: the model
    reads the task from these tokens, and the query's token must keep its ``x``.

    Args:
        model: A model of the lab.
        train: Episodes that the means are taken from.
        test: Episodes that the error is measured on, of the same number of demonstrations.
        layer: The layer, counted from 0.

    Returns:
        The change in squared error, ``[source, target]``.

    Raises:
        ValueError: If there is no such layer, or the episodes have no demonstrations.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> train, test = (lab.problem_episodes(run.config.problem, 20, seed=i) for i in (0, 1))
        >>> swaps = lab.swap_matrix(run.model(), train, test, layer=3)
        >>> swaps.delta_loss.shape, bool(swaps.conditional_decoding > 0)
        (torch.Size([4, 4]), True)
    """
    if train[0].n_shots < 1:
        raise ValueError("a swap needs demonstrations; n_shots is 0")
    edits: dict[str, list[Intervention]] = {episode.task: [] for episode in train}
    for at in train[0].problem.swapped_at(train[0].n_shots):
        vectors = task_vectors(collect(model, train, layers=[layer], position=at))
        for task, interventions in edits.items():
            vector, mode = vectors[task, layer], vectors.subspace(layer)
            interventions.append(inject(vector, layer, mode=mode, position=at))
    return matrix_of_edits(model, test, edits, layer)


@dataclass(frozen=True, repr=False)
class PosteriorAgreement:
    """The model's encoding of the task compared with the exact posterior.

    Attributes:
        posterior: ``P(true task | demonstrations)``, ``[example]``.
        neighbours: The share of the k nearest neighbours that are of the true task, ``[example]``.
        n_shots: Demonstrations.
        layer: The layer of the representations.
        k: The number of neighbours.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> lab.posterior_agreement(lab.shipped_run(), n_shots=3, n=30).posterior.shape
        torch.Size([120])
    """

    posterior: Float[Tensor, " example"]
    neighbours: Float[Tensor, " example"]
    n_shots: int
    layer: int
    k: int

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of the two."""
        return _rank_correlation(self.posterior, self.neighbours)

    def __repr__(self) -> str:
        return (
            f"PosteriorAgreement({self.n_shots} demonstrations, layer {self.layer}: mean posterior "
            f"of the true task {self.posterior.mean():.2f}, of the neighbours "
            f"{self.neighbours.mean():.2f}, rank correlation {self.correlation:.2f})"
        )


def posterior_agreement(
    run: Run,
    n_shots: int,
    *,
    layer: int | None = None,
    step: int | None = None,
    n: int = 250,
    k: int = 10,
    position: int = -1,
    seed: int = 0,
) -> PosteriorAgreement:
    """Compare the model's encoding of the task with the exact posterior over tasks.

    Args:
        run: A run on a problem whose ``posterior`` is known, such as a
            :class:`SparseLinearMixture`.
        n_shots: Demonstrations; with few, the posterior is undecided on some prompts.
        layer: The layer; by default the one with the highest TD.
        step: The checkpoint; by default the last.
        n: Sequences per task.
        k: Neighbours.
        position: The token whose representation is taken; -1 is the query.
        seed: Seed of the sequences.

    Raises:
        ValueError: If the problem's posterior is not known.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> found = lab.posterior_agreement(lab.shipped_run(), n_shots=3, n=30)
        >>> float(found.neighbours.mean()) < float(found.posterior.mean())
        True
    """
    problem = run.config.problem
    episodes = problem_episodes(problem, n, n_shots, seed=seed)
    xs = torch.stack([episode.xs for episode in episodes])
    answers = torch.stack([episode.target for episode in episodes])
    ys = torch.cat([torch.stack([episode.ys for episode in episodes]), answers[:, None]], dim=1)
    labels = balanced_labels(len(problem.tasks), n)
    exact = problem.posterior(Batch(xs, ys, labels))[:, -1]
    activations = collect(run.model(step), episodes, position=position)
    if layer is None:
        layer = task_decodability(activations, k=k).best_layer()
    _, nearest = neighbours(activations.at(layer), k)
    of_truth = labels[nearest] == labels[:, None]
    posterior = exact[torch.arange(len(labels)), labels]
    return PosteriorAgreement(posterior, of_truth.float().mean(1), n_shots, layer, k)


def _swap_layer(model: Any, train: Sequence[LabEpisode], held_out: Sequence[LabEpisode]) -> int:
    """The layer at which other tasks' means harm most compared with the task's own."""

    def harm(layer: int) -> float:
        return swap_matrix(model, train, held_out, layer).conditional_decoding

    return max(range(model.cfg.n_layers), key=harm)


def _late_mean(values: Float[Tensor, "batch point"], batch: Batch, late_from: int) -> float:
    """The mean over the late points, by their weights."""
    weights = torch.ones_like(values) if batch.weights is None else batch.weights
    late = slice(late_from, None)
    return float((values * weights)[:, late].sum() / weights[:, late].sum())


def _rank_correlation(one: Float[Tensor, " value"], other: Float[Tensor, " value"]) -> float:
    """Spearman's."""
    from scipy.stats import spearmanr  # takes half a second to import

    return float(spearmanr(one.tolist(), other.tolist()).statistic)
