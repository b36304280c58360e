"""Methods of making task vectors side by side: the same queries, and each method's own controls.

An accuracy under injection can come from the kind of answer as well as from the mapping. So every
method is run a second time on training prompts in which the mapping is broken and everything else
is kept, and both are injected at the layer and scale chosen on the dev queries. What counts is the
gain over that control.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.atomic_io import read_json, write_text
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import holm
from transformer_lens_taskvec.analysis.comparison import compare
from transformer_lens_taskvec.analysis.fidelity import Divergence, few_shot_answers
from transformer_lens_taskvec.analysis.sweep import layer_sweep
from transformer_lens_taskvec.controls import control_vectors
from transformer_lens_taskvec.experiment import enough_sets
from transformer_lens_taskvec.models.counted import Tallied
from transformer_lens_taskvec.models.protocol import fingerprint, model_name
from transformer_lens_taskvec.prompts import (
    EXAMPLE_ARROW,
    Episode,
    PromptTemplate,
    permute_mapping,
    sample_splits,
    shuffle_labels,
)
from transformer_lens_taskvec.scoring import Scores, evaluate, evaluate_many
from transformer_lens_taskvec.tasks.base import Task
from transformer_lens_taskvec.vectors.base import Injectable
from transformer_lens_taskvec.vectors.methods import METHODS, Make, Method, chosen_methods

__all__ = [
    "CONTROLS",
    "METHODS",
    "OTHER_TASK",
    "RANDOM",
    "SAME_CHOICES",
    "Method",
    "MethodComparison",
    "compare_methods",
    "published",
]

_RESULTS = "results.json"
_FORMAT = "taskvec-bench-1"

RANDOM = "random"
"""The control of a random direction with the norm of what the method injects."""

SAME_CHOICES = "same choices"
"""The control of a method that chooses something, such as heads, from the true prompts: what it
makes of prompts with shuffled labels with these choices. Other methods do not have it."""

OTHER_TASK = "other task"
"""The control of another task's vector, if most answers are among that task's answers too, and no
demonstration belongs to both."""


def _shuffle_all(episodes: Sequence[Episode], seed: int) -> list[Episode]:
    """Return the episodes with demonstrations' answers shuffled, and the queries' answers too.

    A method that is trained against the answers would learn the mapping from them.
    """
    others = permute_mapping(episodes, seed)
    shuffled: list[Any] = [*shuffle_labels(episodes, seed)]
    return [replace(one, query=other.query) for one, other in zip(shuffled, others, strict=True)]


CONTROLS: Mapping[str, Callable[[Sequence[Episode], int], list[Episode]]] = {
    "shuffled labels": _shuffle_all,
    "permuted mapping": permute_mapping,
}
"""What a method's own controls are made from.

- ``shuffled labels``: in each prompt the answers of the demonstrations are shuffled, and the
  queries have one another's answers;
- ``permuted mapping``: every input has another input's output, the same one in all prompts.
"""


@dataclass(frozen=True, repr=False)
class MethodComparison(Shown):
    """Methods of making task vectors on the same episodes; made by :func:`compare_methods`.

    Attributes:
        units: What was measured of each method and task, as plain values.
        baselines: Each task's accuracy and loss without and with demonstrations.
        settings: What it was asked for.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model, tasks = tv.load_model("toy"), tv.find_tasks(["XOR", "OR", "NOR"])
        >>> found = tv.compare_methods(model, tasks, methods=["mean"], n_shots=4, n=12, n_dev=12)
        >>> found.summary()[["method", "tasks", "carried"]].values.tolist()
        [['mean', 3, 3]]
        >>> found.headline.split(":")[0]
        'mean carries the mapping on 3 of 3 tasks'
    """

    units: tuple[Mapping[str, Any], ...]
    baselines: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]

    @property
    def control(self) -> str:
        """The control that gains are over: the first that was asked for."""
        return str(self.settings["controls"][0])

    def to_frame(self) -> pd.DataFrame:
        """Return one row per method and task.

        Columns: ``method, task, layer, scale`` (chosen on the dev queries), ``accuracy, low, high``
        (Wilson's 95 % interval over distinct queries), ``nll``, ``divergence`` (KL from the
        few-shot distribution of the first answer token, nats), ``nothing`` (accuracy with
        nothing injected in the same prompts), one column per control, ``gain, gain_low,
        gain_high, p, p_holm`` (over :attr:`control`, paired; Holm's correction over all rows),
        ``dev_accuracy, n_distinct``, and ``seconds, tokens`` that making the vectors took. A
        control that a method or task does not have is NaN.
        """
        kinds = self.settings["controls"]
        rows = [_row(unit, kinds) for unit in self.units if "error" not in unit]
        frame = pd.DataFrame(rows)
        if len(frame):
            adjusted = holm(torch.tensor(frame.p.to_numpy(), dtype=torch.float64)).tolist()
            frame.insert(list(frame).index("p") + 1, "p_holm", adjusted)
        return frame

    def summary(self) -> pd.DataFrame:
        """Return one row per method, the one that carries the mapping on most tasks first.

        Columns: ``method, tasks`` (how many it was measured on), ``accuracy``, ``control`` and
        ``gain`` (means over tasks), ``carried`` (tasks whose gain is positive with ``p_holm`` below
        0.05), and ``seconds`` per task.
        """
        frame = self.to_frame()
        if not len(frame):
            return pd.DataFrame(columns=["method", "tasks", "carried"])
        frame["carried"] = (frame.p_holm < 0.05) & (frame.gain > 0)
        by_method = frame.groupby("method", sort=False)
        found = pd.DataFrame(
            {
                "tasks": by_method.size(),
                "accuracy": by_method.accuracy.mean(),
                "control": by_method[self.control].mean(),
                "gain": by_method.gain.mean(),
                "carried": by_method.carried.sum(),
                "seconds": by_method.seconds.mean(),
            }
        ).reset_index()
        order = ["carried", "gain"]
        return found.sort_values(order, ascending=False, kind="stable").reset_index(drop=True)

    @property
    def headline(self) -> str:
        """Which methods carry the mapping and not only the kind of answer, in one sentence."""
        parts = [
            f"{row['method']} carries the mapping on {row['carried']} of {row['tasks']} tasks: "
            f"accuracy {row['accuracy']:.2f}, {row['control']:.2f} with {self.control}"
            for row in self.summary().to_dict("records")
        ]
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "format": _FORMAT,
            "headline": self.headline,
            "settings": dict(self.settings),
            "baselines": {task: dict(one) for task, one in self.baselines.items()},
            "units": [dict(unit) for unit in self.units],
        }

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> MethodComparison:
        """Return what :func:`compare_methods` wrote to a folder.

        Raises:
            ValueError: If the file is damaged.
            OSError: If it cannot be read.
        """
        found = read_json(Path(folder) / _RESULTS, "damaged, or not of this version's benchmark")
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise ValueError(f"{Path(folder) / _RESULTS} is not of this version's benchmark")
        return cls(tuple(found["units"]), found["baselines"], found["settings"])

    def __repr__(self) -> str:
        table = self.summary().to_string(index=False, float_format="{:.2f}".format)
        refused = [unit for unit in self.units if "error" in unit]
        notes = [f"{unit['method']}, {unit['task']}: {unit['error']}" for unit in refused]
        return "\n".join([f"MethodComparison({self.settings['model']})", table, *notes])


def compare_methods(
    model: Any,
    tasks: Mapping[str, Task] | Iterable[Task],
    *,
    methods: Iterable[str | Method] | Mapping[str, Make] | None = None,
    controls: Sequence[str] = ("shuffled labels", RANDOM),
    n_shots: int = 5,
    n: int = 25,
    n_dev: int = 20,
    n_test: int = 100,
    seed: int = 0,
    template: PromptTemplate = EXAMPLE_ARROW,
    stop: str | None = None,
    out: str | os.PathLike[str] | None = None,
    report: Callable[[Mapping[str, Any]], None] | None = None,
    progress: bool = False,
) -> MethodComparison:
    """Return accuracies of methods of making task vectors, next to each method's own controls.

    Every method gets the same training episodes, and its vectors are injected into the same dev and
    test queries. The layer and scale with the highest dev accuracy are used for the test, for the
    method and for its controls.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        tasks: The tasks.
        methods: Names in :data:`METHODS`, :class:`benchmark.Method`, or by name functions ``(model,
            episodes) -> Injectable``; by default all that need no gradients.
        controls: What else is injected: :data:`CONTROLS`, for which the method is run again on
            other training episodes, :data:`SAME_CHOICES`, :data:`OTHER_TASK` and :data:`RANDOM`.
            Gains are over the first, which every method and task must have.
        n_shots: Demonstrations in the training prompts, and in the few-shot baseline.
        n: Training episodes per task.
        n_dev: Dev queries per task.
        n_test: Test queries per task; those of a task with fewer inputs repeat.
        seed: Seed of the sampling and the controls.
        template: How the episodes become text.
        stop: As for :func:`evaluate`.
        out: A folder for ``results.json``, written after each method and task. What it already
            holds is not measured again.
        report: Called with each result as soon as it is measured.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a method or control is unknown, ``out`` holds results of other settings, a
            number is out of range, or as for :func:`sample_splits`.

    Warns:
        UserWarning: If a method cannot be used with this model or task; the error is kept in
            ``units``.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model, tasks = tv.load_model("toy"), tv.find_tasks(["XOR", "OR"])
        >>> def my_method(model, episodes):
        ...     return tv.task_vectors(tv.collect(model, episodes[:5], layers=[1]))
        >>> own = {"mine": my_method}
        >>> found = tv.compare_methods(model, tasks, methods=own, n_shots=4, n=12, n_dev=8)
        >>> found.to_frame()[["method", "task", "layer"]].values.tolist()
        [['mine', 'XOR', 1], ['mine', 'OR', 1]]
    """
    wanted = chosen_methods(methods)
    _check_controls(controls)
    chosen = list(tasks.values()) if isinstance(tasks, Mapping) else list(tasks)
    sizes = {"train": n, "dev": n_dev, "test": n_test}
    shared = {"test": enough_sets(chosen, n_test, n_shots)}
    sets = sample_splits(chosen, sizes, n_shots, seed, template=template, demo_sets=shared)
    settings = {
        "model": model_name(model),
        "weights": fingerprint(model),
        "controls": list(controls),
        "n_shots": n_shots,
        **sizes,
        "seed": seed,
        "template": asdict(template),
        "stop": stop,
    }
    kept = _Kept.read(None if out is None else Path(out), settings)
    work = _Work(model, sets, tuple(controls), seed, stop)
    todo = [
        (method, task.name)
        for task in chosen
        for method in wanted
        if (method.name, task.name) not in kept.units
    ]
    with tqdm(total=len(todo), disable=not progress, leave=False) as bar:
        made: dict[str, _Made | str] = {}
        for task in dict.fromkeys(name for _, name in todo):
            kept.baselines[task], divergence = work.baselines(task)
            for method in [method for method, own in todo if own == task]:
                found = work.unit(method, task, divergence, made)
                unit = {"method": method.name, "task": task, **found}
                kept.units[method.name, task] = unit
                kept.write(settings)
                if "error" in unit:
                    warnings.warn(f"{method.name}, {task}: {unit['error']}", stacklevel=2)
                if report is not None:
                    report(unit)
                bar.update()
    order = [(method.name, task.name) for method in wanted for task in chosen]
    baselines = {task.name: kept.baselines[task.name] for task in chosen}
    return MethodComparison(tuple(kept.units[key] for key in order), baselines, settings)


def published() -> pd.DataFrame:
    """Return published accuracies of methods, to set next to one's own.

    Columns: ``method`` (the name in :data:`METHODS`, or ``nothing``), ``model, tasks, accuracy,
    source`` and ``note``, which says where the set-up differs.

    Example:
        >>> found = published()
        >>> found[found.tasks == "bijections"][["method", "accuracy"]].values.tolist()
        [['nothing', 0.672], ['one of few shots', 0.704], ['several of few shots', 0.725]]
    """
    path = Path(__file__).parent / "vectors" / "published.json"
    return pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))


def _check_controls(controls: Sequence[str]) -> None:
    known = (*CONTROLS, RANDOM, SAME_CHOICES, OTHER_TASK)
    if isinstance(controls, str) or not controls or len(set(controls)) < len(controls):
        raise ValueError(f"controls is {controls!r}; give a list of one or more, each once")
    for kind in controls:
        if kind not in known:
            raise ValueError(f"no control {kind!r}; there are: {', '.join(known)}")
    if controls[0] in (SAME_CHOICES, OTHER_TASK):
        raise ValueError(
            f"controls begins with {controls[0]!r}, which some methods or tasks do not have; begin "
            "with another, over which the gains are"
        )


@dataclass(frozen=True)
class _Made:
    """Vectors of a method and of its controls, and what making the vectors took."""

    vectors: Injectable
    controls: Mapping[str, Injectable]
    seconds: float
    tokens: int


@dataclass(frozen=True)
class _Work:
    """What :func:`compare_methods` was asked for."""

    model: Any
    sets: Mapping[str, Sequence[Episode]]
    controls: tuple[str, ...]
    seed: int
    stop: str | None

    def of(self, task: str, part: str, shots: int | None = None) -> list[Episode]:
        """Return a task's episodes of one set, with the first demonstrations only."""
        own = [episode for episode in self.sets[part] if episode.task == task]
        if shots is None:
            return own
        fresh = [replace(episode, demo_set=episode.demo_set if shots else None) for episode in own]
        return [replace(episode, demos=episode.demos[:shots]) for episode in fresh]

    def baselines(self, task: str) -> tuple[dict[str, Any], Divergence]:
        """Return a task's accuracy without and with demonstrations, and the divergence from it."""
        few_shot, divergence = few_shot_answers(self.model, self.of(task, "test"), stop=self.stop)
        zero_shot = evaluate(self.model, self.of(task, "test", 0), stop=self.stop)
        found = {
            name: {"accuracy": scores.accuracy, "nll": _number(scores.mean_loss)}
            for name, scores in (("zero_shot", zero_shot), ("few_shot", few_shot))
        }
        return found, divergence

    def unit(
        self, method: Method, task: str, divergence: Divergence, made: dict[str, _Made | str]
    ) -> dict[str, Any]:
        """Return what a method gives on a task; what is made of all tasks is kept in ``made``."""
        if not method.together:
            found = self._made(method, self.of(task, "train"))
        else:
            if method.name not in made:
                made[method.name] = self._made(method, self.sets["train"])
            found = made[method.name]
        if isinstance(found, str):
            return {"error": found}
        try:
            return self._measured(method, found, task, divergence)
        except ValueError as error:
            return {"error": str(error)}

    def _made(self, method: Method, episodes: Sequence[Episode]) -> _Made | str:
        tallied, started = Tallied(self.model), time.perf_counter()
        try:
            vectors = method.make(tallied, episodes)
            seconds, tokens = time.perf_counter() - started, tallied.tokens
            controls = {
                kind: self._control(kind, method, episodes, vectors) for kind in self.controls
            }
        except ValueError as error:
            return str(error)
        there = {kind: one for kind, one in controls.items() if one is not None}
        return _Made(vectors, there, seconds, tokens)

    def _control(
        self, kind: str, method: Method, episodes: Sequence[Episode], vectors: Injectable
    ) -> Injectable | None:
        """Return a control of the method, None if it has none of this kind."""
        if kind == RANDOM:
            return control_vectors(vectors, kinds=[RANDOM], seed=self.seed)[RANDOM]
        if kind == OTHER_TASK:
            return vectors if method.together else None
        if kind == SAME_CHOICES:
            shuffled = _shuffle_all(episodes, self.seed)
            return method.again and method.again(self.model, shuffled, vectors)
        return method.make(self.model, CONTROLS[kind](episodes, self.seed))

    def _others(self, method: Method, made: _Made, task: str) -> dict[str, tuple[Injectable, str]]:
        """Return the controls that a task has, and under which task's name each is kept."""
        found = {kind: (one, task) for kind, one in made.controls.items() if kind != OTHER_TASK}
        other = self.same_answers(task) if OTHER_TASK in self.controls else None
        if other is not None:
            vectors = made.controls.get(OTHER_TASK)
            if vectors is None:
                vectors = method.make(self.model, self.of(other, "train"))
            found[OTHER_TASK] = vectors, other
        return found

    def same_answers(self, task: str) -> str | None:
        """Return the task with most of this one's answers among its own, None if none has half."""
        pairs: dict[str, set[tuple[Any, Any]]] = {}
        for episode in (one for part in self.sets.values() for one in part):
            shown = pairs.setdefault(episode.task, set())
            shown.update((pair.x, pair.y) for pair in (*episode.demos, episode.query))
        own = pairs[task]
        answers = {y for _, y in own}
        shares = {
            name: len(answers & {y for _, y in some}) / len(answers)
            for name, some in pairs.items()
            if not own & some
        }
        best = max(shares, key=shares.__getitem__, default=None)
        return best if best is not None and shares[best] >= 0.5 else None

    def _measured(
        self, method: Method, made: _Made, task: str, divergence: Divergence
    ) -> dict[str, Any]:
        options: dict[str, Any] = {"stop": self.stop}
        dev = self.of(task, "dev", method.shots)
        sweep = layer_sweep(self.model, dev, made.vectors, scales=method.scales, **options)
        scale, layer = sweep.best(task)
        dev_accuracy = float(sweep.at_scale(scale).scores_at(layer).of(task).accuracy)
        others = self._others(method, made, task)
        vectors = (made.vectors, task), *others.values()
        plain, injected, *found = evaluate_many(
            self.model,
            self.of(task, "test", method.shots),
            [[], *(one.inject(name, layer, scale=scale) for one, name in vectors)],
            metrics=[divergence],
            **options,
        )
        by_kind = dict(zip(others, found, strict=True))
        against = compare(injected, by_kind).to_frame().set_index("against")
        low, high = injected.interval()
        sizes = len(made.vectors.tasks) if method.together else 1
        return {
            "layer": layer,
            "scale": scale,
            "shots": method.shots,
            "dev_accuracy": dev_accuracy,
            "accuracy": injected.accuracy,
            "low": low,
            "high": high,
            "nll": _number(injected.mean_loss),
            "divergence": _number(injected.mean("divergence")),
            "nothing": _plain(plain),
            "controls": {
                kind: {
                    **_plain(scores),
                    **against.loc[kind, ["difference", "low", "high", "p"]].to_dict(),
                }
                for kind, scores in by_kind.items()
            },
            "n": len(injected),
            "n_distinct": injected.n_distinct,
            "seconds": made.seconds / sizes,
            "tokens": made.tokens // sizes,
        }


def _plain(scores: Scores) -> dict[str, Any]:
    divergence = _number(scores.mean("divergence"))
    loss = _number(scores.mean_loss)
    return {"accuracy": scores.accuracy, "nll": loss, "divergence": divergence}


def _number(value: float) -> float | None:
    """Return a number that JSON has, or None."""
    return value if math.isfinite(value) else None


def _row(unit: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    names = ("method", "task", "layer", "scale", "accuracy", "low", "high", "nll", "divergence")
    found = unit["controls"]
    against = found[kinds[0]]
    return {
        **{name: unit[name] for name in names},
        "nothing": unit["nothing"]["accuracy"],
        **{kind: found[kind]["accuracy"] if kind in found else math.nan for kind in kinds},
        "gain": against["difference"],
        "gain_low": against["low"],
        "gain_high": against["high"],
        "p": against["p"],
        **{name: unit[name] for name in ("dev_accuracy", "n_distinct", "seconds", "tokens")},
    }


@dataclass
class _Kept:
    """What is measured so far, and the file that keeps it."""

    path: Path | None
    units: dict[tuple[str, str], dict[str, Any]]
    baselines: dict[str, Any]

    @classmethod
    def read(cls, folder: Path | None, settings: Mapping[str, Any]) -> _Kept:
        path = None if folder is None else folder / _RESULTS
        if path is None or not path.exists():
            return cls(path, {}, {})
        known = MethodComparison.load(path.parent)
        if json.loads(json.dumps(settings)) != known.settings:
            differs = [key for key in settings if known.settings.get(key) != settings[key]]
            raise ValueError(
                f"{path} holds results with other settings ({', '.join(differs)}); choose another "
                "folder, or ask for the same"
            )
        units = {(unit["method"], unit["task"]): dict(unit) for unit in known.units}
        return cls(path, units, dict(known.baselines))

    def write(self, settings: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = MethodComparison(tuple(self.units.values()), self.baselines, settings)
        write_text(self.path, json.dumps(found.to_json(), indent=1))
