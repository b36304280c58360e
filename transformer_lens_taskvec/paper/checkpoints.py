"""A study over a model's published training checkpoints (Han et al. 2025, Figure 5)."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.atomic_io import read_json, reading, write_text
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.paper.shots import ShotStudy

Checkpoint = int | str


@dataclass(frozen=True, repr=False)
class CheckpointStudy(Shown):
    """A study at each of several checkpoints.

    Attributes:
        name: The model.
        checkpoints: The checkpoints, in the order they were given.
        results: ``checkpoint, task, shots, layer, td, accuracy, ...``: a study's rows at each.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_toy_run()
        >>> def study(model):
        ...     tasks = tv.bitwise_tasks()
        ...     return tv.paper.run_study(model, tasks, shots=(1, 2), n=12, steer_shots=())
        >>> found = tv.paper.over_checkpoints("toy", [run.steps[-1]], study, load=run.model)
        >>> found.results.columns[:4].tolist()
        ['checkpoint', 'task', 'shots', 'layer']
    """

    name: str
    checkpoints: tuple[Checkpoint, ...]
    results: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """The rows."""
        return self.results

    def __repr__(self) -> str:
        means = self.results.groupby("checkpoint", sort=False)[["td", "accuracy"]].mean()
        lines = [
            f"{checkpoint}: TD {td:.2f}, accuracy {accuracy:.2f}"
            for checkpoint, td, accuracy in means.itertuples()
        ]
        return f"CheckpointStudy({self.name}; {'; '.join(lines)})"


def over_checkpoints(
    name: str,
    checkpoints: Sequence[Checkpoint],
    study: Callable[[Any], ShotStudy],
    *,
    load: Callable[[Checkpoint], Any],
    folder: str | Path | None = None,
    progress: bool = False,
) -> CheckpointStudy:
    """Run a study at each checkpoint, one model in memory at a time.

    >>> over_checkpoints(  # doctest: +SKIP
    ...     "EleutherAI/pythia-160m",
    ...     [1_000, 16_000, 143_000],
    ...     lambda model: run_study(model, bitwise_tasks()),
    ...     load=lambda step: load_model("EleutherAI/pythia-160m", checkpoint_value=step),
    ...     folder="pythia",
    ... )

    Args:
        name: The model, as TransformerLens names it.
        checkpoints: Training steps by TransformerLens' labels (``checkpoint_value``), or revisions
            on the model hub, as strings.
        study: Measures a model.
        load: Loads the model of a checkpoint.
        folder: Where each checkpoint's result is kept as soon as it is there; those found are not
            run again.
        progress: Whether to show a progress bar.

    Returns:
        The results.

    Raises:
        ValueError: If there are no checkpoints, one is given twice, a model cannot be loaded, or a
            kept result is damaged.
    """
    if not checkpoints or len(set(checkpoints)) < len(checkpoints):
        raise ValueError(f"checkpoints must be distinct, and at least one; got {list(checkpoints)}")
    kept = None if folder is None else Path(folder)
    frames = []
    for checkpoint in tqdm(checkpoints, disable=not progress, leave=False, desc=name):
        file = None if kept is None else kept / f"{_safe(name)}@{_safe(str(checkpoint))}.json"
        if file is not None and file.exists():
            frame = _saved(file)
        else:
            model = load(checkpoint)
            measured = study(model).to_json()
            del model
            gc.collect()
            frame = pd.DataFrame(measured["results"])
            if file is not None:
                write_text(file, json.dumps(measured, indent=1) + "\n")
        frame.insert(0, "checkpoint", checkpoint)
        frames.append(frame)
    return CheckpointStudy(name, tuple(checkpoints), pd.concat(frames, ignore_index=True))


def _saved(file: Path) -> pd.DataFrame:
    """The rows that a checkpoint's study left in the folder."""
    problem = "damaged results; remove the file to measure the checkpoint again"
    saved = read_json(file, problem)
    with reading(file, problem):
        frame = pd.DataFrame([dict(row) for row in saved["results"]])
        frame[["td", "accuracy"]].astype(float)
        if not {"task", "shots"} <= set(frame) or "checkpoint" in frame:
            raise ValueError(f"its columns are {list(frame)}")
    return frame


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
