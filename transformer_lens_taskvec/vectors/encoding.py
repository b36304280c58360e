"""Dictionaries: sparse autoencoders of a model's activations, such as those of SAELens.

A dictionary writes an activation as a sum of few of many directions, ``x ~ sum_i f_i d_i + b`` with
``f_i >= 0``. Whatever has ``encode`` and ``decode`` is one; SAELens is not imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.models.protocol import hook_name
from transformer_lens_taskvec.vectors.all_tokens import Origin

_STATEFUL = ("layer_norm", "constant_norm_rescale")
_ROWS = 1024
"""Vectors that are encoded or decoded at once."""


@runtime_checkable
class Dictionary(Protocol):
    """What the functions for sparse features take: an object with ``encode`` and ``decode``.

    Attributes that are read if they are there: ``W_dec [d_sae, d]``, the directions;
    ``threshold [d_sae]``, above which a feature is active; and ``cfg``, SAELens' configuration, or
    ``hook_name``, for the hook point it belongs to.

    Example:
        >>> import torch
        >>> class Signs:
        ...     def encode(self, x):
        ...         return torch.cat([x.relu(), (-x).relu()], dim=-1)
        ...
        ...     def decode(self, features):
        ...         return features[..., :2] - features[..., 2:]
        >>> isinstance(Signs(), Dictionary)
        True
        >>> directions(Signs(), 2)[2]
        tensor([-1.,  0.])
    """

    def encode(self, x: Float[Tensor, "*rows d"], /) -> Float[Tensor, "*rows d_sae"]:
        """Return the activations of the features, none of them negative."""
        ...

    def decode(self, features: Float[Tensor, "*rows d_sae"], /) -> Float[Tensor, "*rows d"]:
        """Return what the features add up to."""
        ...


def check_dictionary(dictionary: Any) -> None:
    """Raise ``ValueError`` unless an object is a dictionary whose two halves work by themselves.

    SAELens' ``layer_norm`` and ``constant_norm_rescale``, and its reshaping of ``hook_z``, note in
    ``encode`` what ``decode`` needs: features that were changed in between would be decoded wrongly
    or not at all.
    """
    if not isinstance(dictionary, Dictionary):
        raise ValueError(
            f"dictionary is of type {type(dictionary).__name__}; give an object with encode and "
            "decode, such as a TopKDictionary or an SAE of SAELens"
        )
    config = getattr(dictionary, "cfg", None)
    for name, kept in (("normalize_activations", _STATEFUL), ("reshape_activations", ("hook_z",))):
        value = _setting(config, name)
        if value in kept:
            raise ValueError(
                f"the dictionary has {name}={value!r}, so decode depends on what was encoded "
                "last, and features of its own cannot be decoded. Use a dictionary without it, or "
                "fold it into the weights"
            )


def check_place(dictionary: Any, model: str, weights: str | None, hook: str, layer: int) -> None:
    """Raise ``ValueError`` if a dictionary is known to belong to another model, hook or layer.

    Args:
        dictionary: The dictionary.
        model: The name of the model that the vectors come from.
        weights: The fingerprint of its weights.
        hook: The vectors' hook point within a block.
        layer: Their layer.

    Warns:
        UserWarning: If the model has other weights than the one it was trained on.
    """
    origin = getattr(dictionary, "origin", None)
    if isinstance(origin, Origin):
        check_origin(origin, model, weights)
    config = getattr(dictionary, "cfg", None)
    names = [
        getattr(dictionary, "hook_name", None),
        *(_setting(_setting(config, part), "hook_name") for part in ("metadata", "meta")),
        _setting(config, "hook_name"),
    ]
    own = next((name for name in names if isinstance(name, str)), None)
    here = hook_name(hook, layer)
    if own is not None and _same_place(own) != _same_place(here):
        raise ValueError(
            f"the dictionary belongs to {own}, and the vectors to {here}; use one of that place, "
            "or vectors of the dictionary's"
        )


def directions(dictionary: Any, d: int) -> Float[Tensor, "d_sae d"]:
    """Return the direction of each feature, float32 on the CPU.

    That is ``W_dec`` where the dictionary has it, and otherwise what one unit of the feature adds:
    ``decode(e_i) - decode(0)``.

    Args:
        dictionary: The dictionary.
        d: The width of what it encodes.

    Raises:
        ValueError: As for :func:`check_dictionary`.
    """
    check_dictionary(dictionary)
    rows = getattr(dictionary, "W_dec", None)
    if isinstance(rows, Tensor):
        return rows.detach().to("cpu", torch.float32)
    n = encode(dictionary, torch.zeros(1, d)).shape[1]
    nothing = decode(dictionary, torch.zeros(1, n))
    units = torch.arange(n).split(_ROWS)
    found = [
        decode(dictionary, torch.nn.functional.one_hot(some, n).float()) - nothing for some in units
    ]
    return torch.cat(found)


@torch.no_grad()
def encode(dictionary: Any, x: Float[Tensor, "row d"]) -> Float[Tensor, "row d_sae"]:
    """Return the features of vectors, float32 on the CPU, wherever the dictionary is."""
    return torch.cat([
        dictionary.encode(rows.to(like(dictionary))).to("cpu", torch.float32)
        for rows in x.split(_ROWS)
    ])  # fmt: skip


@torch.no_grad()
def decode(dictionary: Any, features: Float[Tensor, "row d_sae"]) -> Float[Tensor, "row d"]:
    """Return what features add up to, float32 on the CPU, wherever the dictionary is."""
    return torch.cat([
        dictionary.decode(rows.to(like(dictionary))).to("cpu", torch.float32)
        for rows in features.split(_ROWS)
    ])  # fmt: skip


def like(dictionary: Any) -> Tensor:
    """Return a tensor of the dictionary's type and device: float32 on the CPU if it has none."""
    own = getattr(dictionary, "W_dec", None)
    if isinstance(own, Tensor):
        return own.detach()
    first = next(iter(dictionary.parameters()), None) if hasattr(dictionary, "parameters") else None
    return torch.zeros(()) if first is None else first.detach()


def check_origin(origin: Origin, model: str, weights: str | None) -> None:
    """Raise ``ValueError`` if a dictionary belongs to another model; warn of other weights."""
    if origin.model not in (None, model):
        raise ValueError(
            f"the dictionary belongs to {origin.model!r}, not to {model!r}; train one on this "
            "model. If its transfer is what you measure, rename its origin: "
            "replace(dictionary, origin=replace(dictionary.origin, model=...))"
        )
    if None not in (origin.weights, weights) and origin.weights != weights:
        warnings.warn(
            f"the dictionary was trained on other weights of {model!r} (fingerprint "
            f"{origin.weights}) than these ({weights}): another checkpoint, a finetuned copy or "
            "another precision. Train one on these, unless its transfer is what you measure.",
            stacklevel=4,
        )


def _setting(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _same_place(name: str) -> str:
    """Return one name for the names of the residual stream between two blocks."""
    for alias, of in (("hook_in", "hook_resid_pre"), ("hook_out", "hook_resid_post")):
        if name.count(".") == 2 and name.endswith(f".{alias}"):
            name = name.removesuffix(alias) + of
    parts = name.split(".")
    if parts[-1] == "hook_resid_pre" and parts[1].isdigit() and int(parts[1]) > 0:
        return f"blocks.{int(parts[1]) - 1}.hook_resid_post"
    return name
