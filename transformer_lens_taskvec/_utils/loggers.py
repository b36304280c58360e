"""Where the numbers of a long run go while it runs: TensorBoard, Weights & Biases, trackio.

A logger of your own is anything with the two methods of :class:`Logger`.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from transformer_lens_taskvec._utils.atomic_io import read_json, reading, write_text


@runtime_checkable
class Logger(Protocol):
    """What receives the numbers of a run.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> class Printed:
        ...     def log(self, step, numbers):
        ...         print(step, *(f"{name} {value:.2f}" for name, value in numbers.items()))
        ...     def close(self):
        ...         print("closed")
        >>> isinstance(Printed(), lab.Logger)
        True
    """

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers that were measured at a step, by name."""
        ...

    def close(self) -> None:
        """Write what is still to be written. Nothing is logged afterwards."""
        ...


class TensorBoardLogger:
    """A :class:`Logger` that writes event files for TensorBoard.

    Args:
        folder: Where the files go, for example the folder of the run. They are first written when
            there is something to log.

    Raises:
        ImportError: If tensorboard is not installed.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> logger = lab.TensorBoardLogger("runs/small")  # doctest: +SKIP
        >>> run = lab.train("small", "runs/small", loggers=[logger])  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._writer: Any = None
        self._module = _needed("torch.utils.tensorboard", "TensorBoardLogger", "tensorboard")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """As for :meth:`Logger.log`; one scalar per number."""
        if self._writer is None:
            self._writer = self._module.SummaryWriter(str(self.folder))
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """As for :meth:`Logger.close`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _ServiceLogger:
    """A logger of a service with ``init``, and ``log`` and ``finish`` of what that returns."""

    _module_name: ClassVar[str]
    _extra: ClassVar[str | None] = None

    def __init__(self, project: str, **options: Any) -> None:
        self.project, self.options = project, options
        self._run: Any = None
        self._module = _needed(self._module_name, type(self).__name__, self._extra)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """As for :meth:`Logger.log`; the service's run begins with the first call."""
        if self._run is None:
            self._run = self._module.init(project=self.project, **self.options)
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """As for :meth:`Logger.close`."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class WandbLogger(_ServiceLogger):
    """A :class:`Logger` to Weights & Biases, which TransformerLens installs.

    With ``id`` and ``resume="allow"`` a run that is resumed here is resumed there.

    Args:
        project: The name of the project.
        **options: Passed to ``wandb.init`` (``name``, ``id``, ``resume``, ``mode``, ...).

    Raises:
        ImportError: If wandb is not installed.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> logger = lab.WandbLogger("vectors", id="s0", resume="allow")  # doctest: +SKIP
        >>> run = lab.train("small", "runs/small", loggers=[logger])  # doctest: +SKIP
    """

    _module_name = "wandb"


class TrackioLogger(_ServiceLogger):
    """A :class:`Logger` to trackio, which keeps runs on this machine or on the Hugging Face Hub.

    With ``name`` and ``resume="allow"`` a run that is resumed here is resumed there.

    Args:
        project: The name of the project.
        **options: Passed to ``trackio.init`` (``name``, ``resume``, ``space_id``, ...).

    Raises:
        ImportError: If trackio is not installed.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> logger = lab.TrackioLogger("vectors", name="s0", resume="allow")  # doctest: +SKIP
        >>> run = lab.train("small", "runs/small", loggers=[logger])  # doctest: +SKIP
    """

    _module_name = "trackio"
    _extra = "trackio"


def check_loggers(loggers: Sequence[Any]) -> None:
    """Raise a TypeError unless all of these are loggers, and not their classes."""
    for logger in loggers:
        if isinstance(logger, type) or not isinstance(logger, Logger):
            what = f"the class {logger.__name__}" if isinstance(logger, type) else repr(logger)
            raise TypeError(
                f"loggers holds {what}; give objects with log(step, numbers) and close(), such as "
                'TensorBoardLogger("folder")'
            )


def log_once(
    loggers: Sequence[Logger], rows: Sequence[tuple[int, Mapping[str, float]]], file: Path
) -> None:
    """Give each logger those rows that it has not had yet.

    A file holds the last step that each logger has had, by the name of its class, so no step is
    logged twice however often a run is resumed. A step counts as had before it is logged, and no
    longer if the logger raises.

    Args:
        loggers: The loggers; their own errors are raised.
        rows: All steps so far, in order, each with its numbers.
        file: Where it is kept what each logger has had.
    """
    if not loggers:
        return
    had = _read_had(file)
    for name, logger in zip(_names(loggers), loggers, strict=True):
        for step, numbers in rows:
            if step <= had.get(name, -1):
                continue
            write_text(file, json.dumps({**had, name: step}) + "\n")
            try:
                logger.log(step, numbers)
            except Exception:
                write_text(file, json.dumps(had) + "\n")
                raise
            had[name] = step


@contextmanager
def closing(loggers: Sequence[Logger]) -> Iterator[None]:
    """Close all loggers in the end, whatever happens; an error of the run itself is kept."""
    try:
        yield
    except BaseException:
        for logger in loggers:
            with suppress(Exception):
                logger.close()
        raise
    with ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.close)


def _read_had(file: Path) -> dict[str, int]:
    if not file.exists():
        return {}
    damaged = "damaged record of what was logged; remove it to log everything again"
    found = read_json(file, damaged)
    with reading(file, damaged):
        if not all(type(step) is int for step in found.values()):
            raise ValueError("expected the last step of each logger")
    return dict(found)


def _names(loggers: Sequence[Logger]) -> list[str]:
    """The classes' names; a second logger of a class has a number."""
    seen: Counter[str] = Counter()
    names = []
    for logger in loggers:
        name = type(logger).__name__
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return names


def _needed(module: str, what: str, extra: str | None) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = module if extra is None else f"'transformer-lens-taskvec[{extra}]'"
        package = extra or module
        raise ImportError(f"{what} needs {package}: pip install {install}") from error
