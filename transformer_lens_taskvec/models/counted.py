"""A model that counts what it is asked to run, and runs nothing.

The library's own functions, given this model in place of another, make the same calls in the same
shapes: what they would run is known to the last token, and nothing has run.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transformer_lens_taskvec.models.forward import Hooks, mask_dtype
from transformer_lens_taskvec.models.layouts import position_shapes
from transformer_lens_taskvec.models.protocol import device_of

clock = time.perf_counter

_NOISE = 1 << 20


@dataclass(frozen=True)
class Pass:
    """One forward call.

    Attributes:
        kind: ``"prompts"``; ``"branches"`` of prompts whose keys and values are kept; ``"whole"``
            sequences with the logits of every token; or ``"numbers"``, vectors of the lab.
        rows: The number of rows.
        width: The tokens of each row that run, padding included.
        before: The tokens before them, whose keys and values are there.
        layers: How many tokens of a row enter each block; blocks after the last do not run.
        branches: The number of branches of a row.
        end: The hook point at which the call ends, None if it runs to the logits.
        stored: The tokens whose keys and values are kept before the call, over all rows.
    """

    kind: str
    rows: int
    width: int
    before: int
    layers: tuple[int, ...]
    branches: int = 1
    end: str | None = None
    stored: int = 0


@dataclass
class Count:
    """What models were asked to run.

    Attributes:
        events: In their order, the forward calls, and the shapes ``(row, variant, answer_pos)`` of
            logits that were made apart from them.
        kept: The bytes of the activations that were read, in float32.
        copied: The bytes of a copy of the model.
        seconds: The time that counting took, which running would not.
    """

    events: list[Pass | tuple[int, ...]] = field(default_factory=list)
    kept: int = 0
    copied: int = 0
    seconds: float = 0.0

    @property
    def passes(self) -> list[Pass]:
        """The forward calls."""
        return [event for event in self.events if isinstance(event, Pass)]

    @property
    def reads(self) -> list[tuple[int, ...]]:
        """The shapes of logits that were made apart from calls."""
        return [event for event in self.events if isinstance(event, tuple)]


class Counted:
    """A model in whose place calls are counted.

    Hook functions of the library are called in their layers, with random numbers in the shapes
    that they would meet; those of the caller's are not called. Logits are random too.
    """

    def __init__(self, model: Any, count: Count) -> None:
        """Count in ``count`` what is asked of ``model``."""
        self.counts_for = model
        self._count = count
        self._random = torch.Generator().manual_seed(0)
        self._noise = torch.empty(0)
        blocks = getattr(model, "blocks", None)
        n_layers = int(model.cfg.n_layers)
        self.blocks = [_Standing(block) for block in blocks or [None] * n_layers]
        self.ln_final = _Standing(getattr(model, "ln_final", None))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["counts_for"], name)

    def __deepcopy__(self, memo: Any) -> Counted:
        copied = _Copied(self.counts_for, self._count)
        weights = self.counts_for.parameters()
        self._count.copied = sum(weight.numel() * weight.element_size() for weight in weights)
        return copied

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Hooks = (), **kwargs: Any) -> Any:
        """Count a call, and return random logits or numbers in its results' shape."""
        started = clock()
        try:
            return self._run(tokens, fwd_hooks, **kwargs)
        finally:
            self._count.seconds += clock() - started

    def _run(self, tokens: Tensor, fwd_hooks: Hooks, **kwargs: Any) -> Any:
        rows, width = tokens.shape[:2]
        hooks = [(name, function) for name, function in fwd_hooks if _is_ours(function)]
        names = {name for name, _ in hooks if name.startswith("blocks.")}
        shapes = position_shapes(self.counts_for, sorted(names))
        hidden, entered, at = torch.zeros(rows, width, 1), [], None
        try:
            for layer, block in enumerate(self.blocks):
                hidden = block(hidden)
                entered.append(hidden.shape[1])
                for name, function in hooks:
                    if name.startswith(f"blocks.{layer}."):
                        at = name
                        self._call(function, rows, entered[-1], *shapes[name])
            hidden = self.ln_final(hidden)
            for name, function in hooks:
                if name not in names:
                    at = name
                    self._call(function, rows, width, int(self.cfg.d_model))
            at = None
        finally:
            self._record(tokens, kwargs, entered, at)
        if tokens.ndim == 3:
            return self._like(rows, (width + 1) // 2)
        return self._like(rows, width, int(self.cfg.d_vocab))

    def unembed(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """Count the tokens, and return random logits."""
        self._count.events.append(tuple(hidden.shape[:-1]))
        return self._like(*hidden.shape[:-1], int(self.cfg.d_vocab))

    def _call(self, function: Callable[..., Any], rows: int, width: int, *shape: int) -> None:
        """Call a hook function; the time that it takes would pass in a run too."""
        activation, started = self._like(rows, width, *shape), clock()
        try:
            if function(activation, hook=None) is None:
                self._count.kept += 4 * rows * prod(shape)  # it reads, and edits nothing
        finally:
            self._count.seconds -= clock() - started

    def _record(
        self, tokens: Tensor, kwargs: dict[str, Any], entered: Sequence[int], end: str | None
    ) -> None:
        rows, width = tokens.shape[:2]
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        before = 0 if mask is None else mask.shape[-1] - width
        positions, branches = kwargs.get("position_ids"), 1
        if positions is not None and width:
            # The longest row has no padding: if its last position is not its width's, it branches.
            branches = width // (1 + int((positions[:, -1] - positions[:, 0]).max()))
        kind = "prompts"
        if tokens.ndim == 3:
            kind = "numbers"
        elif branches > 1:
            kind = "branches"
        elif end is None:
            kind = "whole"
        stored = getattr(cache, "stored", 0)
        layers = tuple(entered)
        self._count.events.append(Pass(kind, rows, width, before, layers, branches, end, stored))

    def _like(self, *shape: int) -> Tensor:
        """Return random numbers of a shape, whose rows overlap in memory."""
        *many, width = shape
        n = prod(many)
        if len(self._noise) < n + width + _NOISE // 2:
            size = max(_NOISE, 2 * (n + width))
            noise = torch.randn(size, generator=self._random)
            dtype = torch.float32 if hasattr(self.cfg, "d_input") else mask_dtype(self)
            self._noise = noise.to(device_of(self), dtype)
        last = len(self._noise) - n - width
        start = int(torch.randint(last, (), generator=self._random))
        return self._noise[start : start + n + width - 1].unfold(0, width, 1).view(*many, width)


class Tallied:
    """A model that runs as it is, and adds up the tokens that it is given, padding included."""

    def __init__(self, model: Any) -> None:
        """Add up what ``model`` runs."""
        self.counts_for = model
        self.tokens = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["counts_for"], name)

    def run_with_hooks(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        self.tokens += tokens.shape[:2].numel()
        return self.counts_for.run_with_hooks(tokens, *args, **kwargs)


class _Copied(Counted):
    """A copy of a counted model, to be changed: its weights are not those of the model."""

    def parameters(self) -> Iterator[Tensor]:
        """Yield copies of the weights, of which one at a time is there."""
        for parameter in self.counts_for.parameters():
            yield copy.deepcopy(parameter)


class _Standing(nn.Module):
    """Stands where a module is, whose hooks act and whose work is not done."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.__dict__["stands_for"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_for"], name)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what comes in."""
        return hidden


def _is_ours(function: Callable[..., Any]) -> bool:
    while isinstance(function, partial):
        function = function.func
    return (getattr(function, "__module__", None) or "").startswith("transformer_lens_taskvec.")
