"""From the last hidden states to logits: the unembedding, and what a model does after it.

With a large vocabulary, logits are most of a pass's memory. Where they can be had from the hidden
states that enter the unembedding, a pass ends there, and logits are made of a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

ENTERS = "unembed.hook_in"
"""The hook point of what enters the unembedding."""


@dataclass(frozen=True)
class Readout:
    """What follows the unembedding: logits times ``scale``, softly limited to ``cap``."""

    scale: float = 1.0
    cap: float | None = None

    def logits(
        self, model: Any, hidden: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows vocab"]:
        """Return the logits of hidden states."""
        logits: Tensor = model.unembed(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap


def candidates(model: Any) -> Iterator[Readout]:
    """Yield what may follow the model's unembedding, by its configuration."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    text = None if config is None else config.get_text_config()
    cap, scale, divisor = (
        _number(text, name) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
    )
    yield Readout()
    if cap:
        yield Readout(cap=cap)
    if scale:
        yield Readout(scale=scale)
    if divisor:
        yield Readout(scale=1 / divisor)


class Keep:
    """A hook function that keeps an activation."""

    def __init__(self, of: Callable[[Tensor], Tensor] = lambda activation: activation) -> None:
        """Keep ``of`` the activation."""
        self._of = of
        self.kept: Tensor | None = None

    def __call__(self, activation: Tensor, hook: Any = None) -> None:
        """Keep the activation, and leave it as it is."""
        self.kept = self._of(activation)

    def take(self) -> Tensor:
        """Return what was kept."""
        assert self.kept is not None
        return self.kept


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and value else None
