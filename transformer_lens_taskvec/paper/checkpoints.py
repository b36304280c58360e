"""A study over a model's published training checkpoints (Han et al. 2025, Figure 5)."""

from __future__ import annotations

import gc
import json
import re
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
        results: The study's rows at each checkpoint: ``checkpoint, task, shots, layer, td, ...``.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"checkpoint": [1_000], "td": [0.4], "accuracy": [0.3]})
        >>> CheckpointStudy("EleutherAI/pythia-160m", (1_000,), rows)
        CheckpointStudy(EleutherAI/pythia-160m; 1000: TD 0.40, accuracy 0.30)
    """

    name: str
    checkpoints: tuple[Checkpoint, ...]
    results: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """Return the rows."""
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
    """Return a study's results at each checkpoint, with one model in memory at a time.

    Args:
        name: The model, as TransformerLens names it.
        checkpoints: Training steps by TransformerLens' labels (``checkpoint_value``), or revisions
            on the model hub, as strings.
        study: A function that studies a model.
        load: A function that loads the model at a checkpoint.
        folder: A folder where each checkpoint's result is saved as soon as it is measured; saved
            results are not measured again.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If there are no checkpoints, one is given twice, a model cannot be loaded, or a
            saved result is damaged.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec import lab
        >>> run, tasks = lab.shipped_toy_run(), tv.bitwise_tasks()
        >>> def study(model):
        ...     return tv.paper.run_study(model, tasks, shots=(1, 2), n=12, steer_shots=())
        >>> found = tv.paper.over_checkpoints("toy", [run.steps[-1]], study, load=run.model)
        >>> found.results.columns[:4].tolist()
        ['checkpoint', 'task', 'shots', 'layer']
    """
    if not checkpoints or len(set(checkpoints)) < len(checkpoints):
        raise ValueError(f"checkpoints is {list(checkpoints)}; give at least one, all distinct")
    frames = []
    for checkpoint in tqdm(checkpoints, disable=not progress, leave=False, desc=name):
        place = "@".join(re.sub(r"[^\w.-]|_", "-", part) for part in (name, str(checkpoint)))
        file = None if folder is None else Path(folder) / f"{place}.json"
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
    """Return the rows saved for a checkpoint."""
    problem = "damaged results; remove the file to measure the checkpoint again"
    saved = read_json(file, problem)
    with reading(file, problem):
        frame = pd.DataFrame([dict(row) for row in saved["results"]])
        frame[["td", "accuracy", "n", "n_distinct"]].astype(float)
        if not {"task", "shots"} <= set(frame) or "checkpoint" in frame:
            raise ValueError(f"its columns are {list(frame)}")
    return frame
