"""A training run of any kind, as its folder holds it, and reading one back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from transformer_lens_taskvec._utils.atomic_io import reading, write_text
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.training_state import write_tensors
from transformer_lens_taskvec.lab.problems.base import Problem
from transformer_lens_taskvec.lab.training.folder import (
    check_settings,
    checkpoint_path,
    read_metrics,
    read_settings,
    write_metrics,
)
from transformer_lens_taskvec.lab.training.recipe import Recipe, recipe_named

if TYPE_CHECKING:
    import pandas as pd

M = TypeVar("M", bound=Any)
R = TypeVar("R", bound="TrainingRun")


@dataclass(frozen=True, repr=False)
class TrainingRun(Shown, ABC):
    """A training run, finished or not, as it stands in its folder.

    Attributes:
        path: The folder.
        config: Its settings.
        seed: The seed of weights and data.
        steps: The steps at which there is an evaluation and a checkpoint.
        stopped: Why training ended at the last of them, if :class:`EarlyStopping` ended it.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.load_run(lab.shipped_toy_run().path)
        >>> isinstance(run, lab.TrainingRun), run.finished, run.checkpoint()
        (True, True, 1500)
    """

    path: Path
    config: Recipe
    seed: int
    steps: tuple[int, ...]
    stopped: str | None = field(default=None, kw_only=True)

    _table: ClassVar[tuple[str, str]]
    """What ``to_frame`` shows: a measurement ``[checkpoint, task, ...]``, and its last axis."""

    @property
    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""

    @abstractmethod
    def _summary(self) -> str:
        """The last evaluation in a few words, for ``__repr__``, with the separator before them."""

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken, or training was stopped early."""
        last = bool(self.steps) and self.steps[-1] == self.config.steps
        return last or self.stopped is not None

    def checkpoint(self, step: int | None = None) -> int:
        """The step of a checkpoint: the one given, if it exists, and by default the last.

        Raises:
            ValueError: If there is no checkpoint of that step.
        """
        if not self.steps:
            raise ValueError(
                f"{self.path} holds no checkpoint yet; call lab.train again to resume the run"
            )
        step = self.steps[-1] if step is None else step
        if step not in self.steps:
            raise ValueError(f"no checkpoint at step {step}; there are {list(self.steps)}")
        return step

    def restored(self, step: int | None, make: Callable[[], M]) -> tuple[M, str]:
        """The untrained model that ``make`` makes with a checkpoint's weights, and its name."""
        step = self.checkpoint(step)
        file = checkpoint_path(self.path, step)
        with reading(file, "damaged checkpoint, or another run's"):
            weights = load_file(file)
            n_weights = sum(value.numel() for value in weights.values())
            # Damaged settings may describe a model that no memory can hold.
            if self.config.fewest_weights() > n_weights:
                raise ValueError(
                    f"it holds {n_weights} numbers, too few for the model that config.json "
                    "describes"
                )
            model = make()
            model.load_state_dict(weights)
        return model, f"{self.path.name}@{step}"

    def export(
        self: R, path: str | Path, steps: Sequence[int], *, dtype: torch.dtype = torch.float16
    ) -> R:
        """Write some of the checkpoints as a run of their own, for keeping or sending.

        Args:
            path: An empty or new folder.
            steps: The checkpoints.
            dtype: Of the weights on disk; they are float32 again when loaded.

        Returns:
            The run in the new folder. It cannot be trained further.

        Raises:
            ValueError: If there is no checkpoint at one of the steps, or the folder holds a run.
        """
        target, kept = Path(path), sorted({self.checkpoint(step) for step in steps})
        if (target / "config.json").exists():
            raise ValueError(f"{target} already holds a run; choose another folder")
        for step in kept:
            file = checkpoint_path(self.path, step)
            with reading(file, "damaged checkpoint"):
                weights = load_file(file)
            small = {name: value.to(dtype) for name, value in weights.items()}
            write_tensors(checkpoint_path(target, step), small, {"step": str(step)})
        write_metrics(target, [one for one in read_metrics(self.path) if one["step"] in kept])
        write_text(target / "config.json", (self.path / "config.json").read_text())
        exported: R = self.config.load(target)
        return exported

    def to_frame(self) -> pd.DataFrame:
        """One row per checkpoint, task, and point or number of demonstrations."""
        import pandas as pd

        measured, column = self._table
        values: Tensor = getattr(self, measured)
        axes = [self.steps, self.tasks, range(values.shape[-1])]
        index = pd.MultiIndex.from_product(axes, names=["step", "task", column])
        return pd.DataFrame({measured: values.flatten().numpy()}, index=index).reset_index()

    def __repr__(self) -> str:
        done = "no checkpoint yet"
        if self.steps:
            done = f"step {self.steps[-1]} of {self.config.steps}, {len(self.steps)} checkpoints"
            done += self._summary()
        if self.stopped is not None:
            done += f"; stopped early: {self.stopped}"
        return f"{type(self).__name__}({str(self.path)!r}: {done})"


def load_run(path: str | Path, *, problem: Problem | None = None) -> Any:
    """Read a run from its folder.

    Args:
        path: The folder that ``train`` wrote.
        problem: The problem of the run. It is needed if the problem holds functions of your own,
            which no file can hold, or its class is not defined here.

    Returns:
        The run: a :class:`Run` on a problem, or a :class:`ToyRun` of the toy model.

    Raises:
        FileNotFoundError: If there is no run in the folder.
        ValueError: If the problem is needed and not given, is not the run's, or a file is damaged.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = lab.shipped_run().export(f"{folder}/some", steps=[0, 26000])
        ...     lab.load_run(f"{folder}/some").steps
        (0, 26000)
    """
    path = Path(path)
    saved = read_settings(path)
    with reading(path / "config.json", "not the settings of a run that can be read"):
        given = {} if problem is None else {"problem": problem}
        config = recipe_named(saved["kind"]).from_json(saved, **given)
    if problem is not None:
        check_settings(path, saved, {"problem": problem.to_json()})
    return config.load(path)
