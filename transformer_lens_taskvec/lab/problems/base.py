"""What a problem of the lab is: its sequences, its oracles, and how a prediction counts.

A sequence is ``x_1, y_1, x_2, y_2, ...``, or for a :class:`TokenProblem` a row of tokens. It is of
one of several *latent tasks*, which nothing in it names (Han et al. 2025, section 3.3, App. D-F).

To mix functions of your own, give them to :class:`RegressionFamilies`; for a problem of another
kind, derive a frozen dataclass from :class:`Problem`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from transformer_lens_taskvec._utils.atomic_io import write_text
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.subclasses import subclass_named
from transformer_lens_taskvec.lab.model import (
    ModelSize,
    RegressionConfig,
    RegressionTransformer,
    interleave,
)
from transformer_lens_taskvec.lab.oracles import lasso, least_squares, ridge
from transformer_lens_taskvec.plots import save_figures

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Family = Callable[[Float[Tensor, "batch point dim"], torch.Generator], Float[Tensor, "batch point"]]
"""Draws one function per sequence and applies it to the sequence's inputs, without noise."""

QUICK: Mapping[str, Any] = MappingProxyType(
    {
        "init": "fan_in",
        "batch_size": 64,
        "optimizer": "muon",
        "learning_rate": 1e-3,
        "betas": (0.9, 0.999),
        "muon_learning_rate": 3e-3,
        "warmup": 200,
        "schedule": "cosine",
    }
)
"""The recipe that small models learn fastest with; a problem's ``defaults`` add their sizes."""
_TOLERANCE = 0.3


@dataclass(frozen=True)
class Batch:
    """Sequences of one problem.

    Attributes:
        xs: Inputs, ``[batch, point, dim]``; of a :class:`TokenProblem` its token ids,
            ``[batch, token]``.
        ys: The outputs to be predicted, ``[batch, point]``, or ``[batch, point, output]`` if each
            is of several numbers.
        labels: The latent task of each sequence, an index into the problem's ``tasks``.
        weights: How much each point counts in losses, ``[batch, point]``; None if all count alike.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> batch = lab.SparseLinearMixture.small().sample(4, torch.Generator())
        >>> batch.xs.shape, batch.ys.shape, batch.labels.shape
        (torch.Size([4, 16, 8]), torch.Size([4, 16]), torch.Size([4]))
    """

    xs: Shaped[Tensor, "batch point_or_token ..."]
    ys: Shaped[Tensor, "batch point ..."]
    labels: Int[Tensor, " batch"]
    weights: Float[Tensor, "batch point"] | None = None


@dataclass(frozen=True)
class TaskPredictions:
    """What would be predicted if each latent task were known to be the true one.

    Attributes:
        predictions: ``[batch, point, task]``: the mean of the output; or, of a problem whose
            outputs are tokens, their logits, ``[batch, point, task, token]``.
        variances: The variance of an output that is a number, Gaussian given the task,
            ``[batch, point, task]``; None for tokens.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> problem = lab.SparseLinearMixture.small()
        >>> problem.by_task(problem.sample(3, torch.Generator())).predictions.shape
        torch.Size([3, 16, 4])
    """

    predictions: Float[Tensor, "batch point task ..."]
    variances: Float[Tensor, "batch point task"] | None = None


@runtime_checkable
class Problem(Protocol):
    """A problem: what training, evaluation and the figures ask of a mixture of tasks.

    A problem of your own is a frozen dataclass derived from this class, with ``tasks`` (the names
    of the latent tasks), ``dim`` (of an input), ``n_points`` (pairs in a sequence) and ``sample``.
    Everything else has a default; the most useful thing to add is ``oracles``. Where an output is
    not one number with a squared error, ``n_outputs``, ``losses`` and ``right`` say what it is.

    Attributes:
        tasks: The names of the latent tasks.
        dim: The dimension of an input.
        n_points: Points at which the model predicts: pairs in a sequence.
        loss_kind: What ``losses`` gives: a key of ``LOSS_LABELS``, as in ``Scores.loss_kind``.
        defaults: Settings of :class:`TrainConfig` with which two CPU cores learn the problem in
            minutes.

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
    loss_kind: ClassVar[str] = "squared_error"
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @property
    def n_outputs(self) -> int:
        """The numbers in an output; one, unless a problem says otherwise."""
        return 1

    @property
    def late_from(self) -> int:
        """The first of the points that a late loss averages; by default the second half is late."""
        return self.n_points // 2

    @property
    def query_point(self) -> int:
        """The point whose output an episode asks for by default: the last."""
        return self.n_points - 1

    @abstractmethod
    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """Draw sequences on the generator's device, their latent tasks uniformly unless given."""

    def tokens(self, batch: Batch) -> Shaped[Tensor, "batch token *dim"]:
        """What the model reads: by default ``x_1, y_1, ..., x_n``, by :func:`interleave`."""
        return interleave(batch.xs, batch.ys)

    def predict(
        self, forward: Callable[..., Any], batch: Batch
    ) -> Float[Tensor, "batch point *output"]:
        """A model's predictions at every point, given its ``forward``."""
        predictions: Tensor = forward(self.tokens(batch))
        return predictions

    def make_model(self, size: ModelSize, *, seed: int, device: torch.device | str) -> nn.Module:
        """An untrained model for the problem."""
        config = RegressionConfig(
            d_input=self.dim,
            n_points=self.n_points,
            n_layers=size.n_layers,
            n_heads=size.n_heads,
            d_model=size.d_model,
            init=size.init,
            d_output=self.n_outputs,
            device=str(device),
        )
        return RegressionTransformer(config, seed=seed)

    def losses(
        self,
        predictions: Float[Tensor, "*rows_and_output"],
        targets: Shaped[Tensor, "*rows_and_output"],
        labels: Int[Tensor, "*#rows"],
    ) -> Float[Tensor, "*rows"]:
        """The loss of each prediction, in rows of any shape; by default the squared error.

        Args:
            predictions: What the model or an oracle predicts.
            targets: What was to be predicted.
            labels: The latent tasks, for a problem whose loss depends on them.
        """
        return self.distance(predictions, targets)

    def right(
        self,
        predictions: Float[Tensor, "*rows_and_output"],
        targets: Shaped[Tensor, "*rows_and_output"],
        labels: Int[Tensor, "*#rows"],
    ) -> Bool[Tensor, "*rows"]:
        """Whether each prediction counts as right: by default all numbers within 0.3."""
        near = (predictions - targets).abs() <= _TOLERANCE
        return near if self.n_outputs == 1 else near.all(-1)

    def distance(
        self,
        predictions: Float[Tensor, "*rows_and_output"],
        others: Float[Tensor, "*rows_and_output"],
    ) -> Float[Tensor, "*rows"]:
        """How far apart two predictors' predictions are: by default the squared difference."""
        squares = (predictions - others).square()
        return squares if self.n_outputs == 1 else squares.sum(-1)

    def query_at(self, point: int) -> int:
        """The place of the token at which a point's output is predicted."""
        return 2 * point

    def inputs_until(self, point: int) -> int:
        """How many of a sequence's ``xs`` the prompt of a point's query holds."""
        return point + 1

    def swapped_at(self, point: int) -> tuple[int, ...]:
        """The places of the tokens from which the model reads the task, for a point's query.

        By default the outputs in the second half of the demonstrations. :func:`swap_matrix` swaps
        representations there.
        """
        return tuple(2 * demo + 1 for demo in range(point // 2, point))

    def without_demonstrations(
        self, tokens: Shaped[Tensor, "batch token *dim"], point: int
    ) -> tuple[Shaped[Tensor, "batch short *dim"], tuple[int, ...]]:
        """A point's prompt without demonstrations: a blank token, then the query's ``x``.

        :class:`VectorLoss` puts the few-shot prompt's vector in place of the blank token's.

        Args:
            tokens: What the model reads, as :meth:`tokens` gives it.
            point: The point whose output is asked for, from 1.

        Returns:
            The prompt, and the place of each of its tokens in the sequence; by default a token of
            zeros at the place of the last ``y``, and the query's token. The answer is read at the
            last of them.

        Raises:
            ValueError: If the problem's sequences are not ``x_1, y_1, x_2, ...`` and it does not
                define this method.
        """
        if type(self).tokens is not Problem.tokens or type(self).predict is not Problem.predict:
            raise ValueError(
                f"{type(self).__name__} does not say what its prompt without demonstrations is; "
                "give it a method without_demonstrations(tokens, point)"
            )
        places = (self.query_at(point) - 1, self.query_at(point))
        query = tokens[:, places[1:]]
        return torch.cat([torch.zeros_like(query), query], dim=1), places

    def oracles(self, batch: Batch) -> dict[str, Float[Tensor, "batch point *output"]]:
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

    def by_task(self, batch: Batch) -> TaskPredictions:
        """The exact predictive distribution given each task, the pairs before a point and its x.

        Raises:
            ValueError: If the problem does not define it.
        """
        raise ValueError(
            f"{type(self).__name__} has no exact predictions by task; give it a method "
            "by_task(batch) that returns TaskPredictions"
        )

    def expected(self, batch: Batch) -> Float[Tensor, "batch point"]:
        """``E[y | what comes before it]``: the mean of ``by_task``, weighted by ``posterior``.

        Raises:
            ValueError: If the problem does not define them.
        """
        given = self.by_task(batch).predictions
        return (self.posterior(batch) * given).sum(-1)

    def finding(self, run: Any) -> Finding:
        """What a trained run shows of what the problem is for, with its figures.

        Args:
            run: A :class:`Run` on this problem.

        Raises:
            ValueError: If the problem has no finding of its own.
        """
        raise ValueError(
            f"{type(self).__name__} has no finding of its own; measure_emergence(run) measures any "
            "run"
        )

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


@dataclass(frozen=True, repr=False)
class Finding(Shown):
    """What a run shows of what its problem is for.

    Attributes:
        sentence: The finding in words, with its numbers.
        numbers: What it rests on, by name; numbers, texts and lists of them.
        figures: The figures, by name.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> lab.Finding("The error falls to 0.02.", {"error": 0.02}).to_frame()
          measure  value
        0   error   0.02
    """

    sentence: str
    numbers: Mapping[str, Any]
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """One row per number that is not a list, with columns ``measure`` and ``value``."""
        import pandas as pd

        single = {name: one for name, one in self.numbers.items() if not isinstance(one, list)}
        return pd.DataFrame({"measure": list(single), "value": list(single.values())})

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``finding.json`` and ``finding_NAME.png`` for each figure; return their paths."""
        path = Path(folder) / "finding.json"
        described = {"sentence": self.sentence, **self.numbers}
        write_text(path, json.dumps(described, indent=1) + "\n")
        figures = {f"finding_{name}": figure for name, figure in self.figures.items()}
        return [path, *save_figures(figures, folder)]

    def __repr__(self) -> str:
        return f"Finding({self.sentence})"


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
    needed = ("tasks", "dim", "n_points", "sample", "oracles", "losses", "right", "to_json")
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


@lru_cache(maxsize=64)
def constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """A tensor of these numbers, not to be written to.

    It is kept, because a copy to a device makes the host wait, which a training step must not.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


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
