"""The paper's experiments on pretrained models, one call each (Han et al. 2025, section 4).

A study runs tasks at several numbers of shots. From one pass over each prompt it takes task
decodability at every layer, the accuracy of the answers, and that with the right task's mean or the
Null task's injected at the layer where TD of the train episodes peaks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from transformer_lens_taskvec import plots
from transformer_lens_taskvec._utils.atomic_io import write_text
from transformer_lens_taskvec._utils.metrics import Metric
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import Observe, collect
from transformer_lens_taskvec.analysis.decodability import Decodability, task_decodability
from transformer_lens_taskvec.analysis.steering import SteeringEffect, steering_variants
from transformer_lens_taskvec.analysis.td_accuracy import AccuracyFit, td_vs_accuracy
from transformer_lens_taskvec.models.protocol import model_name
from transformer_lens_taskvec.paper.published import PUBLISHED_R2
from transformer_lens_taskvec.prompts import (
    EXAMPLE_ARROW,
    Episode,
    PromptTemplate,
    sample_episodes,
    sample_splits,
    with_instructions,
)
from transformer_lens_taskvec.scoring import Scores, evaluate_many
from transformer_lens_taskvec.tasks.base import NULL, Task
from transformer_lens_taskvec.vectors.means import task_vectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class ShotStudy(Shown):
    """What :func:`run_study` measured.

    Attributes:
        model: The model's name.
        decodability: By number of shots, TD of the test episodes.
        scores: By number of shots, how the test episodes were answered.
        steering: By number of shots, the positive and the negative intervention.
        layer: The layer of the interventions, the fit and the tables.
        fit: Accuracy against TD over tasks and shots, Null left out.
        settings: Sizes, seed, template.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> study = tv.paper.run_study(model, tv.bitwise_tasks(), shots=(1, 2), n=12)
        >>> list(study.decodability), list(study.steering)
        ([1, 2], [1, 2])
        >>> study.layer, study.steering[1].layer
        (1, 1)
        >>> study.to_frame().columns[:4].tolist()
        ['task', 'shots', 'layer', 'td']
    """

    model: str
    decodability: dict[int, Decodability]
    scores: dict[int, Scores]
    steering: dict[int, SteeringEffect]
    layer: int
    fit: AccuracyFit
    settings: dict[str, Any]

    @property
    def shots(self) -> tuple[int, ...]:
        """The numbers of shots."""
        return tuple(self.scores)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks."""
        return next(iter(self.scores.values())).tasks

    def to_frame(self) -> pd.DataFrame:
        """One row per task and number of shots.

        Columns ``task, shots, layer, td, td_low, td_high, accuracy, low, high`` (95 % intervals,
        Wilson's of the accuracy) and ``positive, negative`` where there are interventions.
        """
        rows = []
        for shots in self.shots:
            td = self.decodability[shots].at(self.layer).tolist()
            td_interval = self.decodability[shots].interval(self.layer).tolist()
            for index, task in enumerate(self.tasks):
                scores = self.scores[shots].of(task)
                low, high = scores.interval()
                row = {
                    "task": task,
                    "shots": shots,
                    "layer": self.layer,
                    "td": td[index],
                    "td_low": td_interval[index][0],
                    "td_high": td_interval[index][1],
                    "accuracy": scores.accuracy,
                    "low": low,
                    "high": high,
                    **{name: scores.mean(name) for name in scores.extra},
                }
                if shots in self.steering:
                    row["positive"] = self.steering[shots].positive.of(task).accuracy
                    row["negative"] = self.steering[shots].negative.of(task).accuracy
                rows.append(row)
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        """Everything but the activations, as plain values."""
        rows = json.loads(self.to_frame().to_json(orient="records"))
        by_layer = {
            shots: {"layers": found.layers, "tasks": found.tasks, "td": found.scores.tolist()}
            for shots, found in self.decodability.items()
        }
        fit = {name: _known(value) for name, value in vars(self.fit).items() if name != "points"}
        return {
            "model": self.model,
            "settings": self.settings,
            "layer": self.layer,
            "fit": fit,
            "results": rows,
            "td_by_layer": by_layer,
        }

    def figures(self) -> dict[str, Figure]:
        """TD against accuracy, TD by layer, pairwise TD, an embedding, and the interventions."""
        most = self.decodability[max(self.shots)]
        drawn = {
            "td_vs_accuracy": plots.plot_td_vs_accuracy(self.fit),
            "td_by_layer": plots.plot_decodability(self.decodability),
            "td_by_task": plots.plot_decodability(most),
            "pairwise_td": plots.plot_pairwise(most, self.layer),
            "embedding": plots.plot_embedding(most.activations, self.layer),
        }
        for shots, effect in self.steering.items():
            drawn[f"steering_{shots}_shot"] = plots.plot_steering(effect)
        return {name: plots.figure_of(ax) for name, ax in drawn.items()}

    def report(self, name: str = "study", figures: Iterable[str] = ()) -> str:
        """A page in Markdown, with the published figures beside the measured ones.

        Args:
            name: ``"pos"`` and ``"bitwise"`` have published figures.
            figures: Names of PNG files to show.
        """
        n_layers = len(self.decodability[max(self.shots)].layers)
        lines = [
            f"# {name}: {self.model}",
            "",
            f"TD, fit and interventions at layer {self.layer} of {n_layers}, counted from 0, where "
            "TD of the train episodes first reaches its peak over all shots.",
            "",
        ]
        for shots, found in self.decodability.items():
            lines.append(
                f"- {shots} shots: mean TD {float(found.at(self.layer).mean()):.2f} (chance "
                f"{found.chance:.2f}); on these episodes the highest is "
                f"{float(found.mean.max()):.2f}, at layer {found.best_layer()}."
            )
        lines += [
            f"- {self.fit!r}.",
            "",
            *markdown(self.to_frame()),
        ]
        if name in PUBLISHED_R2:
            published = ", ".join(f"{m} {r2:.2f}" for m, r2 in PUBLISHED_R2[name].items())
            lines += ["", f"R^2 in the paper (Han et al. 2025): {published}."]
        lines += ["", *(f"![{figure}]({figure})" for figure in figures)]
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path, name: str = "study") -> list[Path]:
        """Write ``results.json``, the figures, and ``report.md``; returns their paths."""
        folder = Path(folder)
        paths = plots.save_figures(self.figures(), folder)
        write_text(folder / "results.json", json.dumps(self.to_json(), indent=1) + "\n")
        write_text(
            folder / "report.md",
            self.report(name, [path.name for path in paths if path.suffix == ".png"]),
        )
        return [folder / "results.json", folder / "report.md", *paths]

    def __repr__(self) -> str:
        return f"ShotStudy({self.model}: shots {list(self.shots)}; {self.fit!r})"


def run_study(
    model: Any,
    tasks: Mapping[str, Task],
    *,
    test_tasks: Mapping[str, Task] | None = None,
    shots: Sequence[int] = (1, 4, 10),
    steer_shots: Sequence[int] | None = None,
    layer: int | None = None,
    n: int = 100,
    n_vectors: int | None = None,
    k: int = 10,
    null: str = NULL,
    seed: int = 0,
    template: PromptTemplate = EXAMPLE_ARROW,
    instructions: Mapping[str, str] | None = None,
    metrics: Iterable[str | Metric] = (),
    stop: str | None = None,
    progress: bool = False,
) -> ShotStudy:
    """TD, accuracy and interventions of tasks at several numbers of shots.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        tasks: The tasks, ``null`` among them: :func:`bitwise_tasks` or :func:`pos_tasks`.
        test_tasks: The same tasks on other data, for everything but the vectors; by default the
            same data, with other queries.
        shots: Numbers of demonstrations.
        steer_shots: Those at which to intervene; by default all of them.
        layer: The layer of the interventions and the fit; by default the first at which TD of the
            train episodes, those of the vectors, is within a standard error of its highest, over
            tasks and shots.
        n: Test episodes a task.
        n_vectors: Episodes a task that the vectors are the means of; by default as many as ``n``.
        k: Neighbours that vote in TD.
        null: The task whose mean is the negative intervention.
        seed: Seed of the sampling.
        template: How the episodes become text.
        instructions: For each task a text that the prompt begins with; see
            :func:`with_instructions`.
        metrics: Further metrics, as for :func:`evaluate_many`.
        stop: As for :func:`evaluate`.
        progress: Whether to show progress bars.

    Returns:
        The measurements.

    Raises:
        ValueError: If ``null`` is not among the tasks or ``steer_shots`` not among the shots, or as
            for :func:`sample_splits`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> study = tv.paper.run_study(model, tv.bitwise_tasks(), shots=(1, 2), n=12)
        >>> frame = study.to_frame()
        >>> one_shot = frame[(frame.shots == 1) & (frame.task != "Null")]
        >>> bool((one_shot.positive > one_shot.negative).all())
        True
    """
    unknown = sorted(set(steer_shots or ()) - set(shots))
    if unknown:
        raise ValueError(
            f"steer_shots has {unknown[0]}, which is not among the shots {list(shots)}"
        )
    if null not in tasks:
        raise ValueError(f"no task {null!r} among {', '.join(tasks)}; it is the negative one")
    n_vectors = n if n_vectors is None else n_vectors
    steer_shots = tuple(shots) if steer_shots is None else tuple(steer_shots)
    test, means = {}, {}
    td_of_train: list[Decodability] = []
    for count in shots:
        parts = _episodes(tasks, test_tasks, n_vectors, n, count, seed, template)
        if instructions is not None:
            parts = [with_instructions(part, instructions) for part in parts]
        train, test[count] = parts
        if layer is None or count in steer_shots:
            of_train = collect(
                model, train, layers=None if layer is None else [layer], progress=progress
            )
            means[count] = task_vectors(of_train)
            td_of_train.append(task_decodability(of_train, k))
    layer = _peak(td_of_train) if layer is None else layer
    decodability, scores, steering = {}, {}, {}
    metrics = list(metrics)
    for count in shots:
        steers = count in steer_shots
        activations, found = evaluate_many(
            model,
            test[count],
            steering_variants(means[count], layer, null) if steers else [[]],
            observe=Observe(),
            metrics=metrics,
            stop=stop,
            progress=progress,
        )
        decodability[count], scores[count] = task_decodability(activations, k), found[0]
        if steers:
            steering[count] = SteeringEffect(found[0], found[1], found[2], layer)
    settings = {
        "n": n,
        "n_vectors": n_vectors,
        "k": k,
        "seed": seed,
        "template": asdict(template),
        "instructions": None if instructions is None else dict(instructions),
        "stop": stop,
        "bos": scores[shots[0]].bos,
    }
    fit = td_vs_accuracy(decodability, scores, layer=layer, leave_out=(null,))
    return ShotStudy(model_name(model), decodability, scores, steering, layer, fit, settings)


def _episodes(
    tasks: Mapping[str, Task],
    test_tasks: Mapping[str, Task] | None,
    n_train: int,
    n_test: int,
    n_shots: int,
    seed: int,
    template: PromptTemplate,
) -> list[list[Episode]]:
    """Train and test episodes."""
    if test_tasks is None:
        sets = sample_splits(
            tasks, {"train": n_train, "test": n_test}, n_shots, seed, template=template
        )
        return [sets["train"], sets["test"]]
    return [
        sample_episodes(tasks, n_train, n_shots, seed, template=template),
        sample_episodes(test_tasks, n_test, n_shots, seed, template=template),
    ]


def _peak(decodability: Iterable[Decodability]) -> int:
    """The first layer whose TD, over tasks and shots, is within a standard error of the highest.

    TD rises where the task is written and then often stays; the highest of a plateau is chance, and
    at its end an intervention comes too late.
    """
    found = list(decodability)
    mean = torch.stack([one.mean for one in found]).mean(dim=0)
    highest = float(mean.max())
    n_points = sum(int(one.n.sum()) for one in found)
    error = math.sqrt(highest * (1 - highest) / n_points)
    return found[0].layers[int((mean >= highest - error).int().argmax())]


def _known(value: Any) -> Any:
    """A number or a pair of them, with None for what is not known: JSON has no NaN."""
    if isinstance(value, tuple):
        return [_known(part) for part in value]
    return value if math.isfinite(value) else None


def markdown(frame: pd.DataFrame) -> list[str]:
    """A frame as the lines of a Markdown table."""
    names = list(frame.columns)
    rows = [
        " | ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row)
        for row in frame.itertuples(index=False)
    ]
    return [
        f"| {' | '.join(names)} |",
        "|" + "---|" * len(names),
        *(f"| {row} |" for row in rows),
    ]
