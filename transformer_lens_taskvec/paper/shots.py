"""The paper's experiments on pretrained models, one call each (Han et al. 2025, section 4).

A study runs tasks at several numbers of shots. One pass over each prompt gives task decodability
at every layer and accuracy: without intervention, and with the right task's or the Null task's mean
injected at the layer where TD of the train episodes peaks.
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
from einops import rearrange, reduce

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
        decodability: TD of the test episodes, by number of shots.
        scores: Scores of the test episodes, by number of shots.
        steering: The positive and the negative intervention, by number of shots.
        layer: The layer of the interventions, the fit and the tables.
        fit: Accuracy against TD over tasks and shots, without Null.
        settings: Sizes, seed, template.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> study = tv.paper.run_study(tv.load_model("toy"), tv.bitwise_tasks(), shots=(1, 2), n=12)
        >>> study.shots, study.layer, study.steering[1].layer
        ((1, 2), 1, 1)
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
        """Return one row per task and number of shots.

        Columns: ``task, shots, layer, td, td_low, td_high, accuracy, low, high`` (Wilson's 95 %
        intervals), the metrics asked for, ``positive, negative`` where there are interventions,
        and the numbers of episodes and of distinct queries, ``n`` and ``n_distinct``.
        """
        frames = []
        for shots, scores in self.scores.items():
            td, own = self.decodability[shots], [scores.of(task) for task in self.tasks]
            td_low, td_high = rearrange(td.interval(self.layer), "task end -> end task").tolist()
            low, high = zip(*(one.interval() for one in own), strict=True)
            frame = pd.DataFrame({"task": self.tasks, "shots": shots, "layer": self.layer})
            columns = {
                "td": td.at(self.layer).tolist(),
                "td_low": td_low,
                "td_high": td_high,
                "accuracy": [*scores.by_task().values()],
                "low": low,
                "high": high,
                **{name: [*scores.by_task(name).values()] for name in scores.extra},
            }
            if shots in self.steering:
                steered = self.steering[shots]
                columns["positive"] = [*steered.positive.by_task().values()]
                columns["negative"] = [*steered.negative.by_task().values()]
            columns["n"] = [len(one) for one in own]
            columns["n_distinct"] = [one.n_distinct for one in own]
            frames.append(frame.assign(**columns))
        return pd.concat(frames, ignore_index=True)

    def to_json(self) -> dict[str, Any]:
        """Return everything except the activations, as plain values."""
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
        """Return figures of accuracy on TD, TD by layer and pair, an embedding, and steering."""
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
        """Return a page in Markdown, with the paper's R^2 next to the measured one.

        Args:
            name: ``"pos"`` and ``"bitwise"`` have a published R^2.
            figures: File names of the images to show.
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
        lines += [f"- {self.fit!r}.", "", *markdown(self.to_frame())]
        if name in PUBLISHED_R2:
            published = ", ".join(f"{m} {r2:.2f}" for m, r2 in PUBLISHED_R2[name].items())
            lines += ["", f"R^2 in the paper (Han et al. 2025): {published}."]
        lines += ["", *(f"![{figure}]({figure})" for figure in figures)]
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path, name: str = "study") -> list[Path]:
        """Write the figures, ``results.json`` and ``report.md``, and return their paths."""
        figures = self.figures()
        page = self.report(name, [f"{figure}.png" for figure in figures])
        return write_study(folder, self.to_json(), page, figures)

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
    """Return TD, accuracy and interventions of tasks at several numbers of shots.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        tasks: The tasks including ``null``: :func:`bitwise_tasks` or :func:`pos_tasks`.
        test_tasks: The same tasks on other data, to measure everything except the vectors on; by
            default the same data, with other queries.
        shots: Numbers of demonstrations.
        steer_shots: The numbers of shots at which to intervene; all by default.
        layer: The layer of the interventions and the fit; by default the first layer where the TD
            of the train episodes, over tasks and shots, is within a standard error of its highest.
        n: Test episodes per task.
        n_vectors: Train episodes per task, whose means are the vectors; ``n`` by default.
        k: Neighbours that vote in TD.
        null: The task whose mean is the negative intervention.
        seed: Seed of the sampling.
        template: How the episodes become text.
        instructions: The text that the prompt begins with, by task; see :func:`with_instructions`.
        metrics: Further metrics, as for :func:`evaluate_many`.
        stop: As for :func:`evaluate`.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If ``null`` is not among the tasks, or one of ``steer_shots`` not among the
            shots, or as for :func:`sample_splits`.

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
        raise ValueError(f"steer_shots contains {unknown[0]}; it must be among {list(shots)}")
    if null not in tasks:
        raise ValueError(
            f"no task {null!r}, the negative intervention; there are: {', '.join(tasks)}"
        )
    n_vectors = n if n_vectors is None else n_vectors
    steer_shots = tuple(shots) if steer_shots is None else tuple(steer_shots)
    test, means = {}, {}
    td_of_train: list[Decodability] = []
    for count in shots:
        if test_tasks is None:
            sizes = {"train": n_vectors, "test": n}
            parts = [*sample_splits(tasks, sizes, count, seed, template=template).values()]
        else:
            parts = [
                sample_episodes(tasks, n_vectors, count, seed, template=template),
                sample_episodes(test_tasks, n, count, seed, template=template),
            ]
        if instructions is not None:
            parts = [with_instructions(part, instructions) for part in parts]
        train, test[count] = parts
        if layer is None or count in steer_shots:
            layers = None if layer is None else [layer]
            of_train = collect(model, train, layers=layers, progress=progress)
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


def _peak(decodability: Iterable[Decodability]) -> int:
    """Return the first layer whose TD, over tasks and shots, is within a standard error of the top.

    TD rises where the task is written and then often stays high. Which layer of the plateau is
    highest is chance, and an intervention at its end comes too late.
    """
    found = list(decodability)
    mean = reduce(torch.stack([one.mean for one in found]), "shots layer -> layer", "mean")
    highest = float(mean.max())
    n_points = sum(int(one.n.sum()) for one in found)
    error = math.sqrt(highest * (1 - highest) / n_points)
    return found[0].layers[int((mean >= highest - error).int().argmax())]


def _known(value: Any) -> Any:
    """Return a number or a pair of numbers with None for NaN, which JSON does not have."""
    if isinstance(value, tuple):
        return [_known(part) for part in value]
    return value if math.isfinite(value) else None


def markdown(frame: pd.DataFrame) -> list[str]:
    """Return the lines of a Markdown table."""
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


def write_study(
    folder: str | Path, results: Any, page: str, figures: Mapping[str, Figure]
) -> list[Path]:
    """Write the figures, ``results.json`` and ``report.md``, and return their paths."""
    folder = Path(folder)
    paths = plots.save_figures(figures, folder)
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "report.md", page)
    return [folder / "results.json", folder / "report.md", *paths]
