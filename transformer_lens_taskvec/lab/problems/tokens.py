"""Problems whose sequences are rows of tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_lens_taskvec.lab.model import ModelSize, TokenConfig, TokenTransformer
from transformer_lens_taskvec.lab.problems.base import Batch, Problem, constant


@dataclass(frozen=True)
class TokenProblem(Problem):
    """A problem whose sequences are rows of tokens and whose outputs are tokens.

    A problem of your own is a frozen dataclass derived from this class, with ``tasks``,
    ``n_points``, ``d_vocab``, ``n_tokens``, ``query_at`` and ``sample``; the ``xs`` of its batches
    are token ids, ``[batch, token]``, and their ``ys`` the tokens to be predicted,
    ``[batch, point]``. Oracles give logits, for example log-probabilities, ``[batch, point,
    token]``.

    Example:
        >>> from dataclasses import dataclass
        >>> from transformer_lens_taskvec import lab
        >>> @dataclass(frozen=True)
        ... class Repeated(lab.TokenProblem):
        ...     tasks: tuple[str, ...] = ("0", "1", "2")
        ...     n_points: int = 5
        ...     d_vocab: int = 3
        ...     n_tokens: int = 5
        ...     def query_at(self, point):
        ...         return point
        ...     def sample(self, batch_size, generator, *, labels=None):
        ...         if labels is None:
        ...             labels = torch.randint(3, (batch_size,), generator=generator)
        ...         tokens = labels[:, None].repeat(1, 5)
        ...         return lab.Batch(tokens, tokens, labels)
        >>> batch = Repeated().sample(2, torch.Generator().manual_seed(0))
        >>> Repeated().losses(torch.zeros(2, 5, 3), batch.ys, batch.labels[:, None])[0, 0]
        tensor(1.0986)
    """

    loss_kind: ClassVar[str] = "cross_entropy"
    dim: ClassVar[int] = 1  # type: ignore[misc]

    @property
    @abstractmethod
    def d_vocab(self) -> int:
        """Number of tokens."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Tokens in a sequence."""

    @property
    def n_outputs(self) -> int:
        """Logits at a token."""
        return self.d_vocab

    @abstractmethod
    def query_at(self, point: int) -> int:
        """As for :meth:`Problem.query_at`."""

    def tokens(self, batch: Batch) -> Int[Tensor, "batch token"]:
        """The token ids."""
        return batch.xs

    def predict(
        self, forward: Callable[..., Any], batch: Batch
    ) -> Float[Tensor, "batch point token"]:
        """A model's logits at every point."""
        places = tuple(self.query_at(point) for point in range(batch.ys.shape[1]))
        logits: Tensor = forward(batch.xs)
        return logits[:, constant(places, logits.device)]

    def make_model(self, size: ModelSize, *, seed: int, device: torch.device | str) -> nn.Module:
        """An untrained :class:`TokenTransformer`."""
        config = TokenConfig(
            d_vocab=self.d_vocab,
            n_ctx=self.n_tokens,
            n_layers=size.n_layers,
            n_heads=size.n_heads,
            d_model=size.d_model,
            init=size.init,
            device=str(device),
        )
        return TokenTransformer(config, seed=seed)

    def losses(
        self,
        predictions: Float[Tensor, "*rows token"],
        targets: Int[Tensor, "*rows"],
        labels: Int[Tensor, "*#rows"],
    ) -> Float[Tensor, "*rows"]:
        """The NLL in nats of each token to be predicted."""
        flat = F.cross_entropy(predictions.flatten(0, -2), targets.flatten(), reduction="none")
        return flat.view(targets.shape)

    def right(
        self,
        predictions: Float[Tensor, "*rows token"],
        targets: Int[Tensor, "*rows"],
        labels: Int[Tensor, "*#rows"],
    ) -> Bool[Tensor, "*rows"]:
        """Whether the likeliest token is the right one."""
        return predictions.argmax(-1) == targets

    def distance(
        self,
        predictions: Float[Tensor, "*rows token"],
        others: Float[Tensor, "*rows token"],
    ) -> Float[Tensor, "*rows"]:
        """The Kullback-Leibler divergence in nats of the predictions from the other ones."""
        logp, logq = others.log_softmax(-1), predictions.log_softmax(-1)
        return (logp.exp() * (logp - logq).nan_to_num()).sum(-1)

    def inputs_until(self, point: int) -> int:
        """How many tokens the prompt of a point's query holds."""
        return self.query_at(point) + 1

    def swapped_at(self, point: int) -> tuple[int, ...]:
        """By default the query's token."""
        return (self.query_at(point),)
