"""When the context wins over what a model has learnt: measured, and predicted in closed form.

Wang and Sato (2024) call it a hijack if the bigrams learnt in training overrule the context. In a
context that ends in the trigger ``q``, the output ``o`` has followed ``q`` ``c_o`` times, and a
rival ``b`` ``c_b`` times. An associative memory answers ``o`` rather than ``b`` if::

    gamma (a_o - a_b)  >  log pi_b(b|q) / pi_b(o|q),    a_v = (c_v e^beta + n_v - c_v)
                                                              / (k e^beta + T - k)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.lab.problems.bigrams.formula import predicted_logits
from transformer_lens_taskvec.plots import styled
from transformer_lens_taskvec.plots.style import COLOURS, new_axes

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SWEEPS: Mapping[str, str] = {
    "n_output": "times that o followed the trigger",
    "n_rival": "times that b did, after o twice",
    "length": "tokens in the context, o twice",
    "bigram_gap": "log π(b|q) / π(o|q), o once",
}
"""What is varied in a hijack curve, and how figures call it."""


@dataclass(frozen=True)
class Conflict:
    """The contexts of one condition.

    Attributes:
        output: The token ``o``.
        rival: The token ``b``.
        n_output: How often ``o`` followed the trigger.
        n_rival: How often ``b`` did.
        length: Tokens in the context, the trigger at its end included.

    Raises:
        ValueError: If the context is too short for so many pairs, or the two tokens are the same.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import Conflict
        >>> Conflict(output=9, rival=5, n_output=2, n_rival=1, length=40).n_rival
        1
    """

    output: int
    rival: int
    n_output: int
    n_rival: int
    length: int

    def __post_init__(self) -> None:
        if self.output == self.rival:
            raise ValueError(f"output and rival are both {self.output}; give two tokens")
        if min(self.n_output, self.n_rival) < 0:
            raise ValueError(
                f"n_output and n_rival must not be negative, got {self.n_output}, {self.n_rival}"
            )
        needed = 2 * (self.n_output + self.n_rival) + 1
        if self.length < needed:
            raise ValueError(
                f"length is {self.length}; {self.n_output} + {self.n_rival} pairs and the trigger "
                f"take {needed} tokens"
            )


def conflicting_contexts(
    problem: Any, conflict: Conflict, n: int, generator: torch.Generator
) -> Int[Tensor, "context token"]:
    """Return contexts in which the output and its rival followed the first trigger so often.

    The pairs stand at random places. The other tokens are drawn from the bigrams, and none of them
    is a trigger, the output or the rival. The last token is the first trigger.

    Args:
        problem: A :class:`TriggeredBigrams`.
        conflict: The two tokens, their counts, and the length.
        n: How many contexts.
        generator: Source of randomness.

    Raises:
        ValueError: If one of the two tokens is a trigger, or there is no other token to draw.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import TriggeredBigrams
        >>> from transformer_lens_taskvec.lab.problems.bigrams import (
        ...     Conflict, conflicting_contexts
        ... )
        >>> conflict = Conflict(output=9, rival=5, n_output=2, n_rival=1, length=40)
        >>> generator = torch.Generator().manual_seed(0)
        >>> tokens = conflicting_contexts(TriggeredBigrams(), conflict, 3, generator)
        >>> [(tokens == token).sum(1).tolist() for token in (0, 9, 5)]  # trigger, output, rival
        [[4, 4, 4], [2, 2, 2], [1, 1, 1]]
    """
    taken = {*range(problem.n_triggers), conflict.output, conflict.rival}
    if len(taken) < problem.n_triggers + 2:
        raise ValueError(
            f"output is {conflict.output} and rival is {conflict.rival}; choose two of the tokens "
            f"{problem.n_triggers} to {problem.d_vocab - 1}, which are no triggers"
        )
    if len(taken) == problem.d_vocab:
        raise ValueError(f"d_vocab is {problem.d_vocab}; no token is left to stand in between")
    device = generator.device
    free = torch.ones(problem.d_vocab, dtype=torch.float64)
    free[list(taken)] = 0
    following, first = ((table * free).to(device) for table in (problem.bigrams, problem.unigrams))
    template = torch.tensor([_template(conflict, generator) for _ in range(n)], device=device)
    columns: list[Tensor] = []
    for place in range(conflict.length):
        chances = following[columns[-1]] if columns else first.expand(n, -1)
        drawn = torch.multinomial(chances, 1, generator=generator).squeeze(1)
        columns.append(torch.where(template[:, place] >= 0, template[:, place], drawn))
    return torch.stack(columns, dim=1)


def _template(conflict: Conflict, generator: torch.Generator) -> list[int]:
    """The tokens of one context, -1 for one to be drawn: the pairs in random order."""
    output, rival = [0, conflict.output], [0, conflict.rival]
    n_free = conflict.length - 1 - 2 * (conflict.n_output + conflict.n_rival)
    parts = [output] * conflict.n_output + [rival] * conflict.n_rival + [[-1]] * n_free
    order = torch.randperm(len(parts), generator=generator, device=generator.device).tolist()
    return [token for part in order for token in parts[part]] + [0]


@dataclass(frozen=True, repr=False)
class HijackCurve(Shown):
    """How likely a model finds an output and its rival, condition by condition.

    Attributes:
        sweeps: What each condition is part of, a key of ``SWEEPS``; the other settings stay fixed.
        conflicts: The conditions.
        bigram_gap: ``log pi_b(b|q) / pi_b(o|q)``, ``[condition]``.
        measured: The model's ``log P(o)`` and ``log P(b)``, ``[condition, context, 2]``.
        predicted: The same by the closed formula.
        beta: The strength of the keys in the formula.
        gamma: The strength of the output in the formula.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import hand_set
        >>> from transformer_lens_taskvec.lab.problems.bigrams import TriggeredBigrams
        >>> from transformer_lens_taskvec.lab.problems.bigrams import hijack_curve
        >>> problem = TriggeredBigrams()
        >>> model = hand_set(problem, 3.0, 8.0)
        >>> found = hijack_curve(model, problem, beta=3.0, gamma=8.0, n=2)
        >>> found.to_frame()["context_wins"].head(3).tolist()  # after o occurred 0, 1, 2 times
        [0.0, 1.0, 1.0]
    """

    sweeps: tuple[str, ...]
    conflicts: tuple[Conflict, ...]
    bigram_gap: Float[Tensor, " condition"]
    measured: Float[Tensor, "condition context two"]
    predicted: Float[Tensor, "condition context two"]
    beta: float
    gamma: float

    @property
    def logit_gap(self) -> Float[Tensor, "condition context"]:
        """``log P(o) - log P(b)``: the context wins where it is positive."""
        return self.measured[..., 0] - self.measured[..., 1]

    @property
    def predicted_gap(self) -> Float[Tensor, "condition context"]:
        """The same by the closed formula."""
        return self.predicted[..., 0] - self.predicted[..., 1]

    @property
    def agreement(self) -> float:
        """The share of contexts in which the token wins that the formula says."""
        return float(((self.logit_gap > 0) == (self.predicted_gap > 0)).double().mean())

    @property
    def r_squared(self) -> float:
        """The share of the variance of the mean logit gaps that the formula explains."""
        found, expected = self.logit_gap.mean(1), self.predicted_gap.mean(1)
        return float(1 - (found - expected).square().sum() / (found - found.mean()).square().sum())

    @property
    def slope(self) -> float:
        """How much the logit gap grows per nat of ``bigram_gap``, by least squares.

        The formula says -1: the likelier the rival is by its bigram, the less the context wins. The
        Bayes-optimal predictor takes an unlikely successor for an output, so that its slope is 1.
        """
        rows = torch.tensor([sweep == "bigram_gap" for sweep in self.sweeps])
        x, y = self.bigram_gap[rows], self.logit_gap[rows].mean(1)
        x = x - x.mean()
        return float((x @ y) / (x @ x))

    def to_frame(self) -> pd.DataFrame:
        """One row per condition.

        Columns ``sweep, output, rival, n_output, n_rival, length, bigram_gap``; means over contexts
        ``p_output, p_rival, logit_gap``, and ``context_wins``, the share in which the logit gap is
        positive; and the same by the formula, with ``predicted_`` before.
        """
        import pandas as pd

        columns: dict[str, Any] = {"sweep": self.sweeps}
        for name in ("output", "rival", "n_output", "n_rival", "length"):
            columns[name] = [getattr(conflict, name) for conflict in self.conflicts]
        columns["bigram_gap"] = self.bigram_gap.tolist()
        for prefix, values in (("", self.measured), ("predicted_", self.predicted)):
            gap = values[..., 0] - values[..., 1]
            columns[f"{prefix}p_output"] = values[..., 0].exp().mean(1).tolist()
            columns[f"{prefix}p_rival"] = values[..., 1].exp().mean(1).tolist()
            columns[f"{prefix}logit_gap"] = gap.mean(1).tolist()
            columns[f"{prefix}context_wins"] = (gap > 0).double().mean(1).tolist()
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        return (
            f"HijackCurve({len(self.conflicts)} conditions of {self.measured.shape[1]} contexts; "
            f"formula with beta {self.beta:.2f}, gamma {self.gamma:.2f}: R2 {self.r_squared:.3f} "
            f"of the logit gap, {100 * self.agreement:.0f} % of the winners)"
        )


def hijack_curve(
    model: Callable[..., Any],
    problem: Any,
    *,
    beta: float | None = None,
    gamma: float | None = None,
    output: int | None = None,
    rival: int | None = None,
    counts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    n: int = 32,
    seed: int = 0,
) -> HijackCurve:
    """Measure when the context wins over the bigrams, and predict it by the closed formula.

    There are four sweeps over contexts of :func:`conflicting_contexts`: how often the output
    followed the trigger; how often its rival did, where the output did twice; the length, where the
    output did twice; and the gap between the two tokens' bigrams, over all candidates, which
    followed once.

    Args:
        model: A model that gives logits at every token, or any function of tokens that does.
        problem: A :class:`TriggeredBigrams`.
        beta: The strength of the keys in the formula. Without both strengths, they are fitted to
            the measured logit gaps by least squares.
        gamma: The strength of the output in the formula.
        output: The token ``o``; by default the candidate with the median probability after the
            first trigger.
        rival: The token ``b``; by default the likeliest after the first trigger that is none.
        counts: The counts in the first two sweeps; by default 0 to 8, or as many as fit.
        lengths: The lengths; by default from half that of the problem to twice as long.
        n: Contexts per condition.
        seed: Their seed.

    Raises:
        ValueError: If one strength is given without the other, there are no contexts, or a length
            is too short.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import hand_set
        >>> from transformer_lens_taskvec.lab.problems.bigrams import TriggeredBigrams
        >>> from transformer_lens_taskvec.lab.problems.bigrams import hijack_curve
        >>> problem = TriggeredBigrams()
        >>> fitted = hijack_curve(hand_set(problem, 3.0, 8.0), problem, n=2)
        >>> round(fitted.beta, 2), round(fitted.gamma, 2), fitted.agreement
        (3.0, 8.0, 1.0)
    """
    if (beta is None) != (gamma is None):
        raise ValueError(f"beta is {beta} and gamma is {gamma}; give both, or neither")
    if n < 1:
        raise ValueError(f"n is {n}; ask for 1 context or more per condition")
    after = problem.bigrams[0]
    free = torch.arange(problem.n_triggers, problem.d_vocab)
    if rival is None:
        rival = int(free[after[free].argmax()])
    if output is None:
        ranked = sorted(set(problem.candidates) - {rival}, key=lambda token: float(after[token]))
        output = ranked[len(ranked) // 2]
    own = problem.n_tokens
    lengths = [own // 2, own, 3 * own // 2, 2 * own] if lengths is None else lengths
    others = [token for token in problem.candidates if token != rival]
    if counts is None:
        counts = range(min(8, (own - 5) // 2) + 1)
    rows = [
        *(("n_output", Conflict(output, rival, count, 0, own)) for count in counts),
        *(("n_rival", Conflict(output, rival, 2, count, own)) for count in counts),
        *(("length", Conflict(output, rival, 2, 0, length)) for length in lengths),
        *(("bigram_gap", Conflict(token, rival, 1, 0, own)) for token in others),
    ]
    sweeps, conflicts = zip(*rows, strict=True)
    generator = torch.Generator().manual_seed(seed)
    contexts = [conflicting_contexts(problem, one, n, generator) for one in conflicts]
    with torch.no_grad():
        logits = [model(tokens)[:, -1].double() for tokens in contexts]
    measured = torch.stack(list(map(_of_two, logits, conflicts)))
    gaps = torch.stack([after[one.rival].log() - after[one.output].log() for one in conflicts])
    if beta is None or gamma is None:
        beta, gamma = _fitted(conflicts, gaps, measured)
    expected = [predicted_logits(problem, tokens, beta, gamma)[:, -1] for tokens in contexts]
    predicted = torch.stack(list(map(_of_two, expected, conflicts)))
    return HijackCurve(sweeps, conflicts, gaps, measured, predicted, beta, gamma)


def _of_two(
    logits: Float[Tensor, "context token"], conflict: Conflict
) -> Float[Tensor, "context two"]:
    """The log-probabilities of the output and of its rival."""
    return logits.log_softmax(-1)[:, [conflict.output, conflict.rival]]


def _fitted(
    conflicts: Sequence[Conflict],
    gaps: Float[Tensor, " condition"],
    measured: Float[Tensor, "condition context two"],
) -> tuple[float, float]:
    """The strengths with which the formula comes closest to the mean logit gaps."""
    from scipy.optimize import least_squares

    counts = [(one.n_output, one.n_rival, one.length) for one in conflicts]
    n_output, n_rival, length = torch.tensor(counts, dtype=torch.float64).T.numpy()
    found = ((measured[..., 0] - measured[..., 1]).mean(1) + gaps).numpy()

    def residual(strengths: Any) -> Any:
        beta, gamma = strengths
        weight, k = math.exp(beta), n_output + n_rival
        return gamma * (n_output - n_rival) * weight / (k * weight + length - k) - found

    best = least_squares(residual, x0=(2.0, 5.0), bounds=((-5.0, 0.0), (20.0, 200.0)))
    return float(best.x[0]), float(best.x[1])


@styled
def plot_hijack(
    curves: HijackCurve | Mapping[str, HijackCurve],
    sweep: str = "n_output",
    ax: Axes | None = None,
    *,
    value: str = "p_output",
) -> Axes:
    """Draw one sweep: what was measured as points, and the closed formula as lines.

    Args:
        curves: A curve, or several by the names that the legend gives them.
        sweep: What is varied, a key of ``SWEEPS``.
        ax: Where to draw; by default on new axes.
        value: A column of :meth:`HijackCurve.to_frame` that has a prediction.

    Raises:
        ValueError: If there is no such sweep or column.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import hand_set
        >>> from transformer_lens_taskvec.lab.problems.bigrams import TriggeredBigrams
        >>> from transformer_lens_taskvec.lab.problems.bigrams import (
        ...     hijack_curve, plot_hijack
        ... )
        >>> problem = TriggeredBigrams()
        >>> ax = plot_hijack(hijack_curve(hand_set(problem), problem, n=2), "length")
        >>> ax.get_xlabel()
        'tokens in the context, o twice'
    """
    if sweep not in SWEEPS:
        raise ValueError(f"sweep must be one of {', '.join(SWEEPS)}, got {sweep!r}")
    labels = {"p_output": "P(o)", "p_rival": "P(b)", "logit_gap": "log P(o) / P(b)"}
    if value not in labels:
        raise ValueError(f"value must be one of {', '.join(labels)}, got {value!r}")
    ax = new_axes(ax)
    named = {"model": curves} if isinstance(curves, HijackCurve) else curves
    for index, (name, curve) in enumerate(named.items()):
        frame = curve.to_frame()
        frame = frame[frame.sweep == sweep].sort_values(sweep)
        places, colour = frame[sweep].tolist(), COLOURS[index]
        marker = "osD^"[index % 4]
        ax.plot(places, frame[value].tolist(), marker, color=colour, label=name)
        ax.plot(
            places,
            frame[f"predicted_{value}"].tolist(),
            "-" if index == 0 else "--",
            color=colour,
            label=f"formula for {name}",
        )
    if value == "logit_gap":
        ax.axhline(0, color="black", linewidth=0.6)
    ax.set(xlabel=SWEEPS[sweep], ylabel=labels[value])
    return ax
