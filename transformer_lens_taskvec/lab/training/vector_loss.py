"""A second loss, which asks for the answer from the vector alone (Yang et al. 2025).

The prompt without demonstrations has two tokens, a blank one and the query's ``x``, at the places
that the last ``y`` and the query have in the sequence. After block ``layer`` the residual stream at
the blank token is replaced by the one that the few-shot prompt has at its last ``y``. All that the
answer can use of the demonstrations is then in this vector::

    x_1 y_1 ... x_k y_k          residual stream at y_k after block ``layer``
                     |
               blank x_{k+1}     ->  y_{k+1}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec.lab.model import LabTransformer
from transformer_lens_taskvec.lab.problems.base import Batch, Problem


@dataclass(frozen=True)
class VectorLoss:
    """The loss of the answers from the vector alone, as a part of the training loss.

    The training loss is ``(L + weight * L_vector) / (1 + weight)``, with ``L_vector`` averaged over
    all points that have a demonstration before them. It follows the idea of task-vector prompting
    (Yang et al. 2025, arXiv 2501.09240): the layer, the weight and the form of the prompt with
    which the paper's models were trained are not established here, so these are choices.

    Attributes:
        layer: The block after which the vector is taken and put in, counted from 0.
        weight: Of this loss, where the usual one has a weight of 1.

    Raises:
        ValueError: If the layer is negative, or the weight is not positive.

    Example:
        >>> from dataclasses import replace
        >>> from transformer_lens_taskvec.lab import PRESETS
        >>> from transformer_lens_taskvec.lab.training.vector_loss import VectorLoss
        >>> config = replace(PRESETS["small"], vector_loss=VectorLoss(layer=2))
        >>> config.to_json()["vector_loss"]
        {'layer': 2, 'weight': 1.0}
    """

    layer: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ValueError(f"layer must be at least 0, got {self.layer}")
        if not self.weight > 0:
            raise ValueError(
                f"weight must be positive, got {self.weight}; to train without this loss, set "
                "vector_loss to None"
            )

    def check(self, problem: Problem, n_layers: int) -> None:
        """Raise a ValueError unless the loss is defined for a problem and a depth."""
        if self.layer > n_layers - 2:
            last = f"choose 0 to {n_layers - 2}" if n_layers > 1 else "use two blocks or more"
            raise ValueError(
                f"vector_loss has layer {self.layer}, after which a model of {n_layers} blocks has "
                f"none left that could read the vector; {last}"
            )
        one = problem.sample(1, torch.Generator().manual_seed(0))
        problem.without_demonstrations(problem.tokens(one), 1)

    def added_to(
        self, loss: Float[Tensor, ""], model: Any, problem: Problem, batch: Batch
    ) -> Float[Tensor, ""]:
        """The training loss of a batch, given its usual loss."""
        points = range(1, batch.ys.shape[1])
        predictions = answers_from_vectors(model, problem, batch, self.layer, points=points)
        rows = rearrange(batch.labels, "batch -> batch 1")
        losses = problem.losses(predictions.float(), batch.ys[:, 1:], rows)
        weights = torch.ones_like(losses) if batch.weights is None else batch.weights[:, 1:]
        own = (losses * weights).sum() / weights.sum()
        return (loss + self.weight * own) / (1 + self.weight)

    def to_json(self) -> dict[str, Any]:
        """The settings in the form of JSON."""
        return dataclasses.asdict(self)


def answers_from_vectors(
    model: Any,
    problem: Problem,
    batch: Batch,
    layer: int | None,
    *,
    points: Sequence[int],
    donors: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch point *output"]:
    """Return a model's predictions from the prompt without demonstrations and a vector.

    Args:
        model: A model of the lab.
        problem: What the sequences are drawn from.
        batch: The sequences, whose demonstrations give the vectors and whose queries are asked.
        layer: The block after which the vector is taken and put in; None for no vector, which
            leaves the blank token as it is.
        points: The points whose outputs are asked for, each 1 or more.
        donors: For each sequence, the one whose vector it gets; by default itself.

    Raises:
        ValueError: If the model is not one of the lab's, the layer or a point is out of range, or
            the problem's prompt without demonstrations is not defined.

    Example:
        >>> import torch
        >>> from transformer_lens_taskvec import lab
        >>> from transformer_lens_taskvec.lab.training.vector_loss import answers_from_vectors
        >>> run = lab.shipped_run()
        >>> problem = run.config.problem
        >>> batch = problem.sample(4, torch.Generator().manual_seed(0))
        >>> answers_from_vectors(run.model(), problem, batch, 3, points=[14, 15]).shape
        torch.Size([4, 2])
    """
    check_vector_model(model)
    n_layers, n_points = len(model.blocks), batch.ys.shape[1]
    if layer is not None and not 0 <= layer < n_layers:
        raise ValueError(f"layer {layer} is out of range: the model has layers 0 to {n_layers - 1}")
    wrong = [point for point in points if not 1 <= point < n_points]
    if wrong:
        raise ValueError(
            f"points holds {wrong[0]}; a vector needs a demonstration, so choose from 1 to "
            f"{n_points - 1}"
        )
    tokens = problem.tokens(batch)
    short = [problem.without_demonstrations(tokens, point) for point in points]
    prompts = rearrange(
        [prompt for prompt, _ in short], "point batch token ... -> (batch point) token ..."
    )
    in_sequence = torch.tensor([places for _, places in short], device=tokens.device)
    places = repeat(in_sequence, "point token -> (batch point) token", batch=len(tokens))
    residual = model.embedded(prompts, places)
    if layer is None:
        residual = model.through(residual)
    else:
        taken_at = in_sequence[:, 0]
        few_shot = tokens[:, : int(taken_at.max()) + 1]
        vectors = model.through(model.embedded(few_shot), stop=layer + 1)[:, taken_at]
        vectors = vectors if donors is None else vectors[donors]
        vectors = rearrange(vectors, "batch point d_model -> (batch point) 1 d_model")
        own = model.through(residual, stop=layer + 1)[:, 1:]
        residual = model.through(torch.cat([vectors, own], dim=1), start=layer + 1)
    outputs: Tensor = model.read_out(model.ln_final(residual[:, -1:]))
    outputs = rearrange(outputs, "(batch point) 1 output -> batch point output", point=len(short))
    return outputs.squeeze(-1) if problem.n_outputs == 1 else outputs


def check_vector_model(model: Any) -> None:
    """Raise a ValueError unless a vector can be put into a model in this way."""
    if not isinstance(model, LabTransformer):
        raise ValueError(
            f"vector_loss needs a RegressionTransformer or a TokenTransformer; the problem makes a "
            f"{type(model).__name__}"
        )
