"""Interventions: hook functions that write a vector into an activation, or remove part of it.

An intervention is a frozen value and at the same time a pair of a hook name and a hook function, so
it can be passed to ``model.run_with_hooks(tokens, fwd_hooks=[...])``, to
``model.hooks(fwd_hooks=[...])``, and to every function of this library that takes interventions. It
acts at chosen positions, in one of the modes of
:mod:`~transformer_lens_taskvec.interventions.modes`.

Replacing the residual stream with a task's mean is the paper's intervention (Han et al. 2025,
App. C); adding is how function vectors are used (Todd et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, fields
from math import isfinite
from numbers import Integral, Real
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec.interventions.modes import MODES, Mode, rewritten
from transformer_lens_taskvec.models.protocol import hook_name
from transformer_lens_taskvec.models.tokens import Position, Separator, as_position, row_indices

# Hook points [batch, head, query, key].
_WITHOUT_POSITION = (".hook_pattern", ".hook_attn_scores")

# TransformerBridge's own names, the only ones that served models accept.
_NATIVE_NAMES = {
    "resid_pre": "hook_in",
    "resid_post": "hook_out",
    "attn_out": "attn.hook_out",
    "mlp_out": "mlp.hook_out",
}


@dataclass(frozen=True, eq=False)
class Intervention:
    """An edit of one activation in one layer; made by :func:`inject` and :func:`ablate`.

    As a bare hook function it takes the activation's second axis to be the position and the last
    prompt token to be its end, as for left-padded prompts. ``evaluate`` and ``generate`` check the
    axes, and find the token where answers follow.

    Attributes:
        layer: The block, counted from 0.
        mode: A name in ``MODES``, ``"zero"``, or a callable.
        vector: ``[d]``, before scaling; None for ``"zero"``. A copy, unless it requires gradients:
            then it is the tensor itself, and in ``run_with_hooks`` gradients reach it. The
            library's own passes (``evaluate``, ``generate``, ...) run without gradients.
        scale: The factor of the vector.
        relative: Whether ``scale`` is in units of the activation's norm at its place: then the
            vector's own length does not count.
        position: Positions of the prompt, negative ones from its end, others from its first real
            token (as a bare hook on a padded batch only negative ones work), or a
            :class:`Separator`; None for every position, the answer's included.
        hook: The hook point within the block, ``"resid_post"`` for ``blocks.{l}.hook_resid_post``.
        head: One head of a hook point with a head axis (``"z"``), or None.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> name, hook_function = tv.ablate(1)  # a pair, as in fwd_hooks
        >>> name
        'blocks.1.hook_resid_post'
    """

    layer: int
    mode: Mode
    vector: Float[Tensor, " d"] | None = None
    scale: float = 1.0
    position: Position = -1
    hook: str = "resid_post"
    head: int | None = None
    relative: bool = False

    def __post_init__(self) -> None:
        """Check the values, and keep a vector of its own."""
        kept: dict[str, Any] = {
            "layer": _whole("layer", self.layer),
            "scale": _finite(self.scale),
            "position": as_position(self.position),
            "head": None if self.head is None else _whole("head", self.head),
        }
        if self.name.endswith(_WITHOUT_POSITION):
            raise ValueError(
                f"hook is {self.hook!r}, whose activation [batch, head, query, key] has the head "
                "where interventions act at a position; ablate the head's output instead "
                "(hook='z', head=...), or give a hook function of your own"
            )
        if self.vector is not None:
            _check_vector(self.vector)
        if self.relative and (self.vector is None or self.mode in ("project", "zero")):
            raise ValueError(f"relative is True, and {self.mode!r} has no strength; leave it out")
        if self.relative and self.vector is not None and not bool(self.vector.any()):
            raise ValueError("relative is True, and the zero vector has no direction")
        if self.vector is not None and not self.vector.requires_grad:
            kept["vector"] = self.vector.clone()
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        """The full name of the hook point, ``blocks.{layer}.hook_...``."""
        return hook_name(self.hook, self.layer)

    def __iter__(self) -> Iterator[Any]:
        """Yield the hook name and the hook function, as ``fwd_hooks`` expects."""
        yield self.name
        yield self

    def __call__(
        self, activation: Float[Tensor, "batch pos *rest"], hook: Any = None
    ) -> Float[Tensor, "batch pos *rest"]:
        """Return an edited copy of the activation.

        Args:
            activation: ``[batch, pos, d]``, or ``[batch, pos, head, d]`` if ``head`` is set.
            hook: The hook point that TransformerLens passes; not used.

        Raises:
            ValueError: If the activation has no positions, no such position or head, or not the
                vector's width.
        """
        if activation.ndim < 3:
            raise ValueError(
                f"the activation at {self.name} has shape {tuple(activation.shape)}, and "
                "[batch, pos, d] or [batch, pos, head, d] is needed; choose another hook"
            )
        n_rows, width = activation.shape[:2]
        indices = row_indices(self.position, (width,) * n_rows, width)
        return self.edit_at(activation, indices.to(activation.device))

    def edit_at(
        self, activation: Float[Tensor, "batch pos *rest"], indices: Int[Tensor, "batch at"]
    ) -> Float[Tensor, "batch pos *rest"]:
        """Return a copy of the activation with the given positions of each row edited."""
        edited = activation.clone()
        rows = torch.arange(len(indices), device=indices.device)
        for at in indices.unbind(dim=1):
            edited[rows, at] = self.edit(activation[rows, at])
        return edited

    def edit(self, rows: Float[Tensor, " row *rest"]) -> Float[Tensor, " row *rest"]:
        """Return edited copies of rows ``[row, d]``, or ``[row, head, d]`` if ``head`` is set."""
        if self.head is None:
            return self._edit(rows)
        if rows.ndim != 3 or self.head >= rows.shape[1]:
            raise ValueError(
                f"head is {self.head}, but the activation at {self.name} has "
                + ("no axis of heads" if rows.ndim != 3 else f"heads 0 to {rows.shape[1] - 1}")
            )
        edited = rows.clone()
        edited[:, self.head] = self._edit(rows[:, self.head])
        return edited

    def _edit(self, rows: Tensor) -> Tensor:
        if self.vector is None:
            return torch.zeros_like(rows)
        vector = self.vector.to(rows.device)
        if vector.shape[-1] != rows.shape[-1]:
            raise ValueError(
                f"the vector for {self.name} has width {vector.shape[-1]}, the activation there "
                f"{rows.shape[-1]}. Is the vector from another model?"
            )
        return rewritten(self.mode, rows, vector, self.scale, relative=self.relative, at=self.name)

    def spec(self, prompt_length: int | None = None) -> dict[str, dict[str, Any]]:
        """Return the intervention as TransformerLens' ``RemoteBridge`` takes it, by hook name.

        A vLLM server must have been started with ``enable_position_interventions=True`` for an
        intervention that does not act at all positions.

        Args:
            prompt_length: The number of tokens of the prompt, a BOS included. Served models count
                positions from its start, so negative ones need it.

        Raises:
            ValueError: If served models lack the operation (project, callables, one head, relative
                strength), or a position cannot be found without ``prompt_length`` or is outside it.

        Example:
            >>> import transformer_lens_taskvec as tv
            >>> tv.ablate(1).spec(prompt_length=12)
            {'blocks.1.hook_out': {'op': 'suppress', 'pos': 11}}
        """
        operations = {"replace": "set", "add": "add", "zero": "suppress"}
        operation = operations.get(self.mode) if isinstance(self.mode, str) else None
        if not isinstance(self.position, int | tuple | None):
            raise ValueError(f"where {self.position!r} is depends on the episode; give an index")
        if operation is None or self.head is not None or self.relative:
            raise ValueError(f"{self!r} has no declarative form; use replace, add or zero")
        spec: dict[str, Any] = {"op": operation}
        if self.vector is not None:
            spec["value"] = (self.vector * self.scale).tolist()
        if isinstance(self.position, int):
            spec["pos"] = _from_start(self.position, prompt_length)
        elif isinstance(self.position, tuple):
            spec["pos"] = [_from_start(one, prompt_length) for one in self.position]
        native = _NATIVE_NAMES.get(self.hook)
        return {f"blocks.{self.layer}.{native}" if native else self.name: spec}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Intervention):
            return NotImplemented
        return all(
            _same(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)
        )

    def __hash__(self) -> int:
        return hash((self.layer, self.mode, self.scale, self.position, self.hook, self.head))

    def __repr__(self) -> str:
        mode = self.mode if isinstance(self.mode, str) else getattr(self.mode, "__name__", "f")
        parts = [self.name, mode]
        if self.head is not None:
            parts.append(f"head={self.head}")
        if self.vector is not None:
            parts.append(f"|v|={float(self.vector.detach().norm()):.3g}")
        if self.scale != 1.0 or self.relative:
            parts.append(f"scale={self.scale:g}{' of the norm' if self.relative else ''}")
        parts.append(f"position={self.position}")
        return f"Intervention({', '.join(parts)})"


def inject(
    vector: Float[Tensor, " d"],
    layer: SupportsIndex,
    *,
    mode: Mode = "replace",
    scale: float = 1.0,
    relative: bool = False,
    position: int | Sequence[int] | Separator | None = -1,
    hook: str = "resid_post",
    head: int | None = None,
) -> Intervention:
    """Return the intervention that writes a vector into an activation (Han et al. 2025, App. C).

    Args:
        vector: ``[d]``, such as ``vectors["AND", layer]``.
        layer: The block to act in, counted from 0.
        mode: A name in ``MODES`` (``"replace"``, ``"add"``, ``"project"``), or a callable
            ``(rows [row, d], vector [d]) -> rows``, like that of :meth:`TaskVectors.subspace`; it
            gets the vector times ``scale``.
        scale: The factor of the vector.
        relative: Whether ``scale`` is in units of the activation's norm at that place: what is
            written is ``scale * |a| * v / |v|``, for every prompt and position its own.
        position: One or several positions of the prompt, -1 its last token, 0 its first; a
            :class:`Separator`; None for all.
        hook: The hook point within the block, as TransformerLens names it.
        head: One head, counted from 0, of a hook point with a head axis (``"z"``).

    Returns:
        An intervention, usable as an element of ``fwd_hooks``.

    Raises:
        ValueError: If the vector is not one finite vector, the layer or head is not a whole number
            of at least 0, the scale is not finite, a position is not a whole number or there is
            none, the hook point has no positions (``"pattern"``), the mode is unknown, or a
            relative strength is asked of ``"project"`` or of the zero vector. The model's layers,
            hook points, heads and widths are checked on use.

    Example:
        >>> import torch
        >>> import transformer_lens_taskvec as tv
        >>> tv.inject(torch.ones(4), 2, scale=0.5)
        Intervention(blocks.2.hook_resid_post, replace, |v|=2, scale=0.5, position=-1)
        >>> tv.inject(torch.ones(4), 2, mode="add")(torch.ones(1, 2, 4))
        tensor([[[1., 1., 1., 1.],
                 [2., 2., 2., 2.]]])
    """
    if not callable(mode) and mode not in MODES:
        named = ", ".join(repr(name) for name in MODES)
        raise ValueError(f"mode is {mode!r}; it must be one of {named}, or a callable")
    return _make(layer, mode, vector, scale, position, hook, head, relative)


def ablate(
    layer: SupportsIndex,
    *,
    mean: Float[Tensor, " d"] | None = None,
    direction: Float[Tensor, " d"] | None = None,
    position: int | Sequence[int] | Separator | None = -1,
    hook: str = "resid_post",
    head: int | None = None,
) -> Intervention:
    """Return the intervention that sets an activation to zero or a mean, or removes a direction.

    Args:
        layer: The block to act in, counted from 0.
        mean: ``[d]``, which replaces the activation (mean ablation).
        direction: ``[d]`` of any nonzero length; the component along it is removed. With neither
            ``mean`` nor ``direction`` the activation becomes zero.
        position: As for :func:`inject`.
        hook: As for :func:`inject`.
        head: As for :func:`inject`.

    Returns:
        An intervention, usable as an element of ``fwd_hooks``.

    Raises:
        ValueError: If both are given, the direction is zero, or as for :func:`inject`.

    Example:
        >>> import torch
        >>> import transformer_lens_taskvec as tv
        >>> tv.ablate(0, hook="z", head=3)  # one attention head's output
        Intervention(blocks.0.attn.hook_z, zero, head=3, position=-1)
        >>> tv.ablate(0, direction=torch.tensor([0.0, 2.0]))(torch.ones(1, 1, 2))
        tensor([[[1., 0.]]])
    """
    if mean is not None and direction is not None:
        raise ValueError("mean and direction are both given; give one of them")
    if mean is not None:
        return _make(layer, "replace", mean, 1.0, position, hook, head)
    if direction is None:
        return _make(layer, "zero", None, 1.0, position, hook, head)
    found = _make(layer, "project", direction, 1.0, position, hook, head)
    if not bool(direction.norm() > 0):
        raise ValueError("direction is the zero vector; it needs a length above 0")
    return found


def altered(intervention: Intervention, **changes: Any) -> Intervention:
    """Return a copy with other values, which are not checked again.

    Checking a vector waits for its device.
    """
    other = copy(intervention)
    for name, value in changes.items():
        object.__setattr__(other, name, value)
    return other


def _make(
    layer: SupportsIndex,
    mode: Mode,
    vector: Tensor | None,
    scale: float,
    position: int | Sequence[int] | Separator | None,
    hook: str,
    head: int | None,
    relative: bool = False,
) -> Intervention:
    number = None if head is None else _whole("head", head)
    at, factor = as_position(position), _finite(scale)
    return Intervention(_whole("layer", layer), mode, vector, factor, at, hook, number, relative)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be 0 or a positive whole number")
    return int(value)


def _finite(scale: Any) -> float:
    if not isinstance(scale, Real) or not isfinite(scale):
        raise ValueError(f"scale is {scale!r}; it must be a finite number")
    return float(scale)


def _check_vector(vector: Any) -> None:
    if not isinstance(vector, Tensor) or vector.ndim != 1:
        shape = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(
            f"vector must be one vector [d], got {shape}; "
            "pick a layer first, as in vectors['AND', layer]"
        )
    if not bool(torch.isfinite(vector).all()):
        raise ValueError("vector has NaN or infinite entries; give a finite vector")


def _from_start(position: int, prompt_length: int | None) -> int:
    if prompt_length is None:
        if position < 0:
            raise ValueError(
                f"position {position} counts from the prompt's end, and served models count from "
                "its start; give the prompt's number of tokens, as in spec(prompt_length=12)"
            )
        return position
    if not -prompt_length <= position < prompt_length:
        raise ValueError(f"position {position} is outside a prompt of {prompt_length} token(s)")
    return position % prompt_length


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a.cpu(), b.cpu()))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)
