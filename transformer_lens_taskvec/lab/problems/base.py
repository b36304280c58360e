"""Mixtures of in-context regression tasks, from which the lab's models learn.

A sequence is ``x_1, y_1, x_2, y_2, ...`` with ``x_i ~ N(0, I)`` and ``y_i = f(x_i) + noise``. The
function ``f`` is drawn for every sequence from one of several families. Which family it was is the
*latent task*: nothing in the sequence names it (Han et al. 2025, section 3.3, App. D-F).

To mix functions of your own, give them to :class:`RegressionFamilies`; for a problem of another
kind, derive a frozen dataclass from :class:`Problem`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec._utils.subclasses import subclass_named
from transformer_lens_taskvec.lab.oracles import lasso, least_squares, ridge

Family = Callable[[Float[Tensor, "batch point dim"], torch.Generator], Float[Tensor, "batch point"]]
"""Draws one function per sequence and applies it to the sequence's inputs, without noise."""

_TOLERANCE = 0.3


@dataclass(frozen=True)
class Batch:
    """Sequences of one problem.

    Attributes:
        xs: Inputs, ``[batch, point, dim]``.
        ys: Noisy outputs, ``[batch, point]``.
        labels: The latent task of each sequence, an index into the problem's ``tasks``.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> batch = lab.SparseLinearMixture.small().sample(4, torch.Generator())
        >>> batch.xs.shape, batch.ys.shape, batch.labels.shape
        (torch.Size([4, 16, 8]), torch.Size([4, 16]), torch.Size([4]))
    """

    xs: Float[Tensor, "batch point dim"]
    ys: Float[Tensor, "batch point"]
    labels: Int[Tensor, " batch"]


@runtime_checkable
class Problem(Protocol):
    """A problem: what training, evaluation and the figures ask of a mixture of tasks.

    A problem of your own is a frozen dataclass derived from this class, with ``tasks`` (the names
    of the latent tasks), ``dim`` (of an input), ``n_points`` (pairs in a sequence) and ``sample``.
    Everything else has a default; the most useful thing to add is ``oracles``.

    Example:
        >>> from dataclasses import dataclass
        >>> from transformer_lens_taskvec import lab
        >>> @dataclass(frozen=True)
        ... class Signs(lab.Problem):
        ...     dim: int = 4
        ...     n_points: int = 8
        ...     tasks: tuple[str, ...] = ("plus", "minus")
        ...     def sample(self, batch_size, generator, *, labels=None):
        ...         if labels is None:
        ...             labels = torch.randint(2, (batch_size,), generator=generator)
        ...         xs = torch.randn(batch_size, self.n_points, self.dim, generator=generator)
        ...         return lab.Batch(xs, xs.sum(-1) * (1 - 2 * labels[:, None]), labels)
        ...     def oracles(self, batch):
        ...         return {**super().oracles(batch), "zero": torch.zeros_like(batch.ys)}
        >>> lab.oracle_errors(Signs(), n_sequences=50).names
        ('least squares', 'ridge', 'lasso', 'zero')
    """

    if TYPE_CHECKING:

        @property
        def tasks(self) -> tuple[str, ...]:
            """The names of the latent tasks."""
    else:  # a property would stop a dataclass from having a field of its name
        tasks: tuple[str, ...]
    dim: int
    n_points: int

    @abstractmethod
    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """Draw sequences on the generator's device, their latent tasks uniformly unless given."""

    def oracles(self, batch: Batch) -> dict[str, Float[Tensor, "batch point"]]:
        """What predictors that know the problem predict for some sequences, at every point.

        An oracle may read the pairs before a point and the point's ``x``. One that also reads
        ``batch.labels`` knows the latent task, as no model can; :func:`oracle_errors` notices.

        Returns:
            Predictions by the oracle's name, ``[batch, point]`` each; by default of least squares,
            ridge and LASSO with a weight of 0.01.
        """
        return {
            "least squares": least_squares(batch.xs, batch.ys),
            "ridge": ridge(batch.xs, batch.ys),
            "lasso": lasso(batch.xs, batch.ys),
        }

    def posterior(self, batch: Batch) -> Float[Tensor, "batch point task"]:
        """``P(task | pairs before the point)``, where it is known exactly.

        Raises:
            ValueError: If the problem does not define it.
        """
        raise ValueError(
            f"{type(self).__name__} has no exact posterior over its tasks; give it a method "
            "posterior(batch) that returns [batch, point, task]"
        )

    def is_right(self, prediction: float, answer: float) -> bool:
        """Whether a prediction counts as right: by default within 0.3 of the answer."""
        return abs(prediction - answer) <= _TOLERANCE

    def to_json(self) -> dict[str, Any]:
        """All settings in the form of JSON: the class's name as ``kind``, and every field.

        Functions and nested dataclasses are recorded by name, under ``own``, and cannot be read
        back.

        Raises:
            TypeError: If a field has no JSON form.
        """
        if not dataclasses.is_dataclass(self):
            raise TypeError(
                f"{type(self).__name__} is not a dataclass, so its settings are unknown; make it a "
                "frozen dataclass, or write to_json and from_json"
            )
        plain: dict[str, Any] = json.loads(json.dumps(fields_of(self), default=_recorded))
        return {"kind": type(self).__name__, **plain}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Problem:
        """The problem with these fields, as :meth:`to_json` gives them, without ``kind``.

        Raises:
            ValueError: If a field was recorded by name only.
        """
        return cls(**{name: restored(value, name) for name, value in fields.items()})


def problem_from_json(described: Mapping[str, Any]) -> Problem:
    """The problem that ``to_json`` described, of any class derived from :class:`Problem`."""
    fields = dict(described)
    name = fields.pop("kind")
    kind = subclass_named(Problem, name)
    if kind is None:
        raise ValueError(
            f"no problem {name!r} is defined; import the module that defines it first, or give the "
            "run's problem as problem="
        )
    problem: Problem = kind.from_json(fields)
    return problem


def check_problem(problem: Any) -> None:
    """Raise a TypeError that says what is missing unless something has all a problem needs."""
    needed = ("tasks", "dim", "n_points", "sample", "oracles", "is_right", "to_json")
    missing = [name for name in needed if not hasattr(problem, name)]
    if missing:
        raise TypeError(
            f"problem is a {type(problem).__name__} without {', '.join(missing)}; derive a frozen "
            "dataclass from lab.Problem with tasks, dim, n_points and sample"
        )


def balanced_labels(
    n_tasks: int, n_per_task: int, device: torch.device | str = "cpu"
) -> Int[Tensor, " batch"]:
    """``n_per_task`` of each label, in order: ``0, 0, ..., 1, 1, ...``.

    Args:
        n_tasks: How many labels there are.
        n_per_task: How many of each.
        device: Where to put them.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> lab.balanced_labels(3, 2).tolist()
        [0, 0, 1, 1, 2, 2]
    """
    return repeat(torch.arange(n_tasks, device=device), "task -> (task each)", each=n_per_task)


def check_sizes(dim: int, n_points: int, noise_variance: float) -> None:
    """Raise a ValueError unless sequences of these sizes can be drawn."""
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if n_points < 2:
        raise ValueError(f"n_points must be at least 2 (a demonstration, a query), got {n_points}")
    if noise_variance < 0:
        raise ValueError(f"noise_variance must not be negative, got {noise_variance}")


def draw_labels(
    batch_size: int,
    n_tasks: int,
    generator: torch.Generator,
    labels: Int[Tensor, " some"] | None = None,
) -> Int[Tensor, " batch"]:
    """The labels as given, or drawn uniformly; on the generator's device."""
    if labels is None:
        return torch.randint(n_tasks, (batch_size,), generator=generator, device=generator.device)
    if labels.shape != (batch_size,):
        raise ValueError(f"labels must be [{batch_size}], batch_size; got {list(labels.shape)}")
    return labels.to(generator.device)


def normal(generator: torch.Generator, *shape: int) -> Float[Tensor, "*shape"]:
    """Standard normal numbers on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)


def with_noise(
    clean: Float[Tensor, "batch point"], variance: float, generator: torch.Generator
) -> Float[Tensor, "batch point"]:
    """Outputs with Gaussian noise of this variance added."""
    return clean + math.sqrt(variance) * normal(generator, *clean.shape)


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, by name; none of any other value."""
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    return {field.name: getattr(value, field.name) for field in fields}


def _recorded(value: Any) -> dict[str, Any]:
    """The record of a value that JSON has no form of: its name, and the fields of a dataclass."""
    if dataclasses.is_dataclass(value):
        return {"own": type(value).__name__, **fields_of(value)}
    name = getattr(value, "__name__", None)
    if name is None:
        raise TypeError(
            f"a problem has a {type(value).__name__} among its fields, which has no JSON form; use "
            "numbers, strings and tuples of them, or write to_json and from_json"
        )
    return {"own": name}


def restored(value: Any, name: str) -> Any:
    """A field's value from its JSON form; a ValueError if some of it was recorded by name only."""
    if isinstance(value, list):
        return tuple(restored(item, name) for item in value)
    if isinstance(value, dict):
        if "own" in value:
            raise ValueError(
                f"{name} holds {value['own']!r}, which no file can hold; give the run's problem "
                "as problem="
            )
        return {key: restored(item, name) for key, item in value.items()}
    return value
