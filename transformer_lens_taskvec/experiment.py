"""The main job in one call: extract task vectors, choose a layer, inject, and measure.

Train episodes give the vectors, dev episodes the layer, test episodes the figures; no query of one
set is a query of another. On the test episodes, controls are injected at the same layers as the
task vectors. The few-shot accuracy is the only figure of prompts that share demonstrations.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from transformer_lens_taskvec._utils.atomic_io import write_text
from transformer_lens_taskvec._utils.errors import Errors
from transformer_lens_taskvec._utils.metrics import Metric
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import Activations, collect
from transformer_lens_taskvec.analysis.comparison import Comparison, compare
from transformer_lens_taskvec.analysis.decodability import Decodability, task_decodability
from transformer_lens_taskvec.analysis.sweep import LayerSweep, layer_sweep
from transformer_lens_taskvec.controls import control_vectors
from transformer_lens_taskvec.models.protocol import check_layers
from transformer_lens_taskvec.prompts import EXAMPLE_ARROW, PromptTemplate, sample_splits, zero_shot
from transformer_lens_taskvec.scoring import Scores, evaluate, evaluate_many, with_texts
from transformer_lens_taskvec.tasks.base import Task
from transformer_lens_taskvec.vectors.base import TaskVectors
from transformer_lens_taskvec.vectors.means import task_vectors

ENOUGH = "enough"
"""As many sets of demonstrations as make intervals at most a tenth wider: :func:`enough_sets`."""

FEWEST_QUERIES = 6
"""The fewest distinct queries of which an exact test can give p < 0.05: 2 * 0.5**6 = 0.03."""


@dataclass(frozen=True, repr=False)
class Experiment(Shown):
    """What :func:`run_experiment` measured.

    Attributes:
        zero_shot: Test queries without demonstrations.
        icl: Test queries after demonstrations.
        injected: Test queries without demonstrations, each task's vector injected at its layer.
        controls: The same with each control in the vector's place, by kind.
        layers: The layer chosen for each task on the dev episodes.
        sweep: Accuracy by layer on the dev episodes.
        decodability: TD of the train episodes.
        activations: Activations of the train episodes.
        vectors: The task vectors.
        errors: What the model answered in ``injected`` where it was wrong, by kind.
        settings: Shots, size of the sets, seed, template, ``stop``, and the number of sets of
            demonstrations in ``icl``, None if they are fresh.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model, tasks = tv.load_model("toy"), tv.bitwise_tasks(null=False)
        >>> tv.run_experiment(model, tasks, n_shots=4, n=12).layers["XOR"]
        1
    """

    zero_shot: Scores
    icl: Scores
    injected: Scores
    controls: dict[str, Scores]
    layers: dict[str, int | None]
    sweep: LayerSweep
    decodability: Decodability
    activations: Activations
    vectors: TaskVectors
    errors: Errors
    settings: dict[str, Any]

    @property
    def comparison(self) -> Comparison:
        """The task vectors compared with no injection and with every control."""
        return compare(self.injected, {"nothing injected": self.zero_shot, **self.controls})

    def to_frame(self) -> pd.DataFrame:
        """Return one row per task, on the test episodes.

        Columns: ``task, zero_shot, icl, injected`` (accuracies), ``low, high`` (Wilson's 95 %
        interval of ``injected``), ``control`` and ``best_control`` (the accuracy of the control
        that does best, and its kind), ``p`` (of the difference from that control, or from no
        injection where that does better, corrected for all tasks and controls), ``layer``, ``n``
        and ``n_distinct`` (episodes and distinct queries), ``conclusive`` (whether there are
        queries enough for a p-value below 0.05), and ``zero_shot_NAME, icl_NAME, injected_NAME``
        for each metric asked for.
        """
        conditions = {"zero_shot": self.zero_shot, "icl": self.icl, "injected": self.injected}
        intervals = pd.DataFrame(
            {task: self.injected.of(task).interval() for task in self.layers}, index=["low", "high"]
        )
        controls = pd.DataFrame({kind: of.by_task() for kind, of in self.controls.items()})
        hardest = self.comparison.hardest().set_index("task")
        columns = {
            **{name: of.by_task() for name, of in conditions.items()},
            **intervals.T,
            "control": controls.max(axis=1),
            "best_control": controls.idxmax(axis=1),
            "p": hardest.p_holm,
            "layer": self.layers,
            "n": hardest.n,
            "n_distinct": hardest.n_distinct,
            "conclusive": hardest.n_distinct >= FEWEST_QUERIES,
            **{
                f"{condition}_{name}": of.by_task(name)
                for name in self.injected.extra
                for condition, of in conditions.items()
            },
        }
        return pd.DataFrame(columns, index=[*self.layers]).rename_axis("task").reset_index()

    def to_json(self) -> dict[str, Any]:
        """Return everything except the activations, as plain values."""
        return {
            "tasks": self.to_frame().set_index("task").to_dict(orient="index"),
            "controls": json.loads(self.comparison.to_frame().to_json(orient="records")),
            "errors": self.errors.to_json(),
            "decodability": {
                "scores": self.decodability.scores.tolist(),
                "layers": list(self.decodability.layers),
                "tasks": list(self.decodability.tasks),
                "k": self.decodability.k,
                "best_layer": self.decodability.best_layer(),
                "held_out": self.decodability.held_out,
            },
            "layer_sweep": {
                "accuracy": self.sweep.accuracy.tolist(),
                "layers": list(self.sweep.layers),
                "tasks": list(self.sweep.tasks),
            },
            "source": asdict(self.vectors.source),
            "settings": self.settings,
            "versions": {
                name: version(name)
                for name in ("transformer-lens-taskvec", "transformer-lens", "torch")
            },
        }

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write ``results.json`` and ``vectors.safetensors`` to a folder.

        Args:
            folder: Created if it does not exist.

        Returns:
            The files written; :func:`~transformer_lens_taskvec.plots.experiment_figures` draws the
            figures.

        Raises:
            OSError: If the folder cannot be written to; neither file is then left half-written.
        """
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        self.vectors.save(out / "vectors.safetensors")
        write_text(out / "results.json", json.dumps(self.to_json(), indent=1))
        return [out / "results.json", out / "vectors.safetensors"]

    def __repr__(self) -> str:
        table = self.to_frame().to_string(index=False, float_format="{:.2f}".format)
        note = _too_few(self.zero_shot)
        return f"Experiment\n{table}" + (f"\n{note}" if note else "")


def run_experiment(
    model: Any,
    tasks: Mapping[str, Task] | Iterable[Task],
    *,
    n_shots: int = 8,
    n: int = 40,
    n_test: int | None = None,
    seed: int = 0,
    template: PromptTemplate = EXAMPLE_ARROW,
    metrics: Iterable[str | Metric] = (),
    stop: str | None = None,
    k: int = 10,
    demo_sets: int | str | None = ENOUGH,
    report: Callable[[str, Any], None] | None = None,
    progress: bool = False,
) -> Experiment:
    """Return zero-shot, few-shot and injected accuracy, and decodability, of tasks in a model.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        tasks: At least two tasks.
        n_shots: Demonstrations in few-shot prompts.
        n: Episodes per task in each of the train, dev and test sets.
        n_test: Episodes per task in the test set, if there shall be others than ``n``.
        seed: Seed of the sampling and the controls; the same seed gives the same results.
        template: How the episodes become text.
        metrics: Further metrics, as for :func:`evaluate_many`.
        stop: As for :func:`evaluate`.
        k: Neighbours for the decodability.
        demo_sets: Sets of demonstrations that the few-shot test prompts of a task share, which
            changes ``icl`` alone: fewer sets are faster, and their interval is wider. None draws
            fresh ones for every prompt. ``"enough"`` takes :func:`enough_sets`.
        report: Called with ``"decodability"`` and ``"layer_sweep"`` and that part of the result, as
            soon as it is measured.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If a task is empty or has too few examples for the shots, there are fewer than
            two tasks, a number is out of range, ``k`` is not below the number of train episodes, or
            ``demo_sets`` is another text, or a number that the tasks cannot give.

    Warns:
        UserWarning: If more episodes are asked for than a task has inputs, or a task has too few
            distinct test queries for any conclusion.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> found = tv.run_experiment(model, tv.bitwise_tasks(null=False), n_shots=4, n=12)
        >>> table = found.to_frame()
        >>> bool((table.injected > table[["zero_shot", "control"]].max(axis=1)).all())
        True
    """
    chosen = list(tasks.values()) if isinstance(tasks, Mapping) else list(tasks)
    if len(chosen) < 2:
        raise ValueError(f"an experiment needs two tasks or more, got {len(chosen)}")
    if not 1 <= k < n * len(chosen):
        raise ValueError(
            f"k is {k} and there are n={n} episodes of {len(chosen)} tasks; k must be at least 1 "
            "and less than the number of episodes"
        )
    check_layers(model, None)
    n_test = n if n_test is None else n_test
    if isinstance(demo_sets, str):
        if demo_sets != ENOUGH:
            raise ValueError(f"demo_sets is {demo_sets!r}; use a number, None or {ENOUGH!r}")
        demo_sets = enough_sets(chosen, n_test, n_shots)
    sets = sample_splits(
        chosen,
        {"train": n, "dev": n, "test": n_test},
        n_shots,
        seed,
        template=template,
        demo_sets={"test": demo_sets},
    )
    activations = collect(model, sets["train"], progress=progress)
    decodability = task_decodability(activations, k)
    if report is not None:
        report("decodability", decodability)
    vectors = task_vectors(activations)
    made = control_vectors(vectors, model, sets["train"], seed=seed)
    options: dict[str, Any] = {"metrics": list(metrics), "stop": stop, "progress": progress}
    random_ones = {"random": made["random"]}
    sweep = layer_sweep(model, zero_shot(sets["dev"]), vectors, controls=random_ones, **options)
    if report is not None:
        report("layer_sweep", sweep)
    layers = {task: sweep.best_layer(task) for task in vectors.tasks}
    queries = zero_shot(sets["test"])
    plain, injected, *controlled = evaluate_many(
        model,
        queries,
        lambda task: [
            [],
            *(some.inject(task, layers[task]) for some in (vectors, *made.values())),
        ],
        **options,
    )
    injected = with_texts(model, queries, injected, lambda task: vectors.inject(task, layers[task]))
    if note := _too_few(plain):
        warnings.warn(note, stacklevel=2)
    return Experiment(
        zero_shot=plain,
        icl=evaluate(model, sets["test"], **options),
        injected=injected,
        controls=dict(zip(made, controlled, strict=True)),
        layers=layers,
        sweep=sweep,
        decodability=decodability,
        activations=activations,
        vectors=vectors,
        errors=injected.errors(tasks=chosen),
        settings={
            "n_shots": n_shots,
            "n": n,
            "n_test": n_test,
            "seed": seed,
            "template": asdict(template),
            "stop": stop,
            "demo_sets": demo_sets,
        },
    )


def enough_sets(tasks: Iterable[Task], n: int, n_shots: int) -> int | None:
    """Return the number of sets of demonstrations that makes intervals a tenth wider at most.

    Compared with fresh demonstrations, that is ``20 + n / 5`` of ``n`` episodes per task where
    answers after the same demonstrations correlate by 0.03, the mean over eight tasks in
    SmolLM2-135M-Instruct (``tutorials/demonstration_sets.py``). It is None where that leaves
    nothing to share, or where a task has too few inputs.

    Args:
        tasks: The tasks.
        n: Episodes per task.
        n_shots: Demonstrations per episode.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> tasks = tv.find_tasks(["upper_case"]).values()
        >>> [enough_sets(tasks, n, n_shots=8) for n in (20, 40, 100)]
        [None, 28, 40]
    """
    found = 20 + n // 5
    if n <= found or not n_shots:
        return None
    left = [len(task) - math.ceil(n / found) for task in tasks if isinstance(task, Sized)]
    few = any(some < n_shots or math.perm(some, n_shots) < 2 * found for some in left)
    return None if few else found


def _too_few(scores: Scores) -> str:
    """Return a sentence on the tasks with too few queries for any conclusion, or nothing."""
    sizes = {task: scores.of(task).n_distinct for task in scores.tasks}
    few = ", ".join(f"{task!r} {n}" for task, n in sizes.items() if n < FEWEST_QUERIES)
    if not few:
        return ""
    return (
        f"Too few distinct test queries for any conclusion: {few}. No test of fewer than "
        f"{FEWEST_QUERIES} can give p < 0.05, whatever the answers; use a larger n, or tasks with "
        "more inputs."
    )
