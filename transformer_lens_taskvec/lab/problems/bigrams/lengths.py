"""How well associative memories do in sequences longer than those of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.lab.problems.base import balanced_labels

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class LengthTest(Shown):
    """How well models know the trigger's output in longer sequences.

    Attributes:
        names: The models, and ``"Bayes"``.
        lengths: Tokens in a sequence, the first that of the problem.
        loss: The mean NLL of the output in nats, ``[model, length]``.
        accuracy: How often the output was the likeliest token, ``[model, length]``.
        n: Sequences per length.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import hand_set
        >>> from transformer_lens_taskvec.lab.problems.bigrams import TriggeredBigrams
        >>> from transformer_lens_taskvec.lab.problems.bigrams import length_test
        >>> problem = TriggeredBigrams()
        >>> length_test({"hand-set": hand_set(problem)}, problem, factors=(1, 2), n=4).lengths
        (40, 80)
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    loss: Float[Tensor, "model length"]
    accuracy: Float[Tensor, "model length"]
    n: int

    def to_frame(self) -> pd.DataFrame:
        """One row per model and length: ``model, length, loss, accuracy``."""
        import pandas as pd

        index = pd.MultiIndex.from_product([self.names, self.lengths], names=["model", "length"])
        values = {"loss": self.loss.flatten().numpy(), "accuracy": self.accuracy.flatten().numpy()}
        return pd.DataFrame(values, index=index).reset_index()

    def __repr__(self) -> str:
        ends = ", ".join(
            f"{name} {one[0]:.2f} -> {one[-1]:.2f}"
            for name, one in zip(self.names, self.accuracy.tolist(), strict=True)
        )
        return f"LengthTest(accuracy at {self.lengths[0]} -> {self.lengths[-1]} tokens: {ends})"


def length_test(
    models: Mapping[str, Callable[..., Any]],
    problem: Any,
    *,
    factors: Sequence[int] = (1, 2, 3, 4),
    n: int = 250,
    seed: int = 0,
) -> LengthTest:
    """Measure how well models give the trigger's output in sequences of several lengths.

    Sequences in which the trigger has its usual successors, or has not occurred, are left out.

    Args:
        models: Models by name, or any functions of tokens that give logits at every token.
        problem: A :class:`TriggeredBigrams`, of the length of training.
        factors: The lengths as multiples of it, of which one may be 1.
        n: Sequences per output and length.
        seed: Their seed.

    Raises:
        ValueError: If a factor is below 1, or there are no sequences.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import hand_set
        >>> from transformer_lens_taskvec.lab.problems.bigrams import TriggeredBigrams
        >>> from transformer_lens_taskvec.lab.problems.bigrams import length_test
        >>> problem = TriggeredBigrams()
        >>> models = {kind: hand_set(problem, positions=kind) for kind in ("relative", "absolute")}
        >>> found = length_test(models, problem, factors=(1, 4), n=20)
        >>> bool(found.loss[0, 1] < found.loss[1, 1])  # relative positions do better
        True
    """
    if n < 1 or not factors or min(factors) < 1:
        raise ValueError(f"n is {n} and factors are {list(factors)}; all must be at least 1")
    outputs = [index for index, task in enumerate(problem.tasks) if task != "usual"]
    labels = torch.tensor(outputs)[balanced_labels(len(outputs), n)]
    loss, right = [], []
    for factor in factors:
        longer = replace(problem, n_points=factor * problem.n_points)
        batch = longer.sample(len(labels), torch.Generator().manual_seed(seed), labels=labels)
        kept, answers = batch.weights[:, -1] > 0, batch.ys[:, -1]
        with torch.no_grad():
            found = [model(batch.xs)[:, -1] for model in models.values()]
        found.append(longer.oracles(batch)["Bayes"][:, -1])
        loss.append([float(F.cross_entropy(one[kept], answers[kept])) for one in found])
        hits = [(one.argmax(-1) == answers)[kept].float() for one in found]
        right.append([float(one.mean()) for one in hits])
    lengths = tuple(factor * problem.n_points for factor in factors)
    names = (*models, "Bayes")
    return LengthTest(names, lengths, torch.tensor(loss).T, torch.tensor(right).T, len(labels))
