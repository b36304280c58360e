"""What attention heads add to the residual stream.

A head adds its output through its own part of ``W_O``. In some models a norm follows (Gemma 2 and
3, OLMo 2 and 3), or a multiplier (Granite): then what attention adds is ``factors * (z / scale @
W_O)``, with the norm's scale in the unedited pass of each prompt, and the heads still sum to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.activations import Activations, collect
from transformer_lens_taskvec.models.forward import mask_dtype
from transformer_lens_taskvec.models.protocol import hook_name, model_name
from transformer_lens_taskvec.prompts import AnyEpisode

PerHead = Float[Tensor, "task layer head d_head"]


def head_means(model: Any, found: Activations) -> tuple[PerHead, PerHead | None]:
    """Return each task's mean outputs of heads, and those over the scale of a norm that may follow.

    Args:
        model: The model.
        found: Activations at the hook point ``z``.

    Returns:
        The means, and the same of each prompt's outputs over the root mean square of what they
        project to together; None in its place without ``W_O``.
    """
    means, scaled = _means(found.values, found), None
    with suppress(AttributeError, NotImplementedError):
        scale = _root_mean_square(model, _through(model, found))
        scaled = _means(found.values / scale[..., None], found)
    return means, scaled


def what_heads_add(
    model: Any,
    episodes: Sequence[AnyEpisode],
    means: PerHead,
    scaled: PerHead | None,
    layers: Sequence[int],
) -> Float[Tensor, "task chosen head d_model"]:
    """Return what each head of some layers adds to the residual stream, without a bias.

    Args:
        model: A model with ``blocks[l].attn.W_O``.
        episodes: A few of these show how heads' outputs reach the residual stream.
        means: From :func:`head_means`, of all layers.
        scaled: The same.
        layers: The layers.

    Raises:
        ValueError: If what attention adds is not the sum of the heads' outputs.
    """
    added = None if scaled is None else _as_added(model, episodes, layers)
    if added is None or scaled is None:
        raise _not_the_sum(model, "no vectors can be made of heads; use task_vectors")
    factors, is_norm = added
    outputs = scaled if is_norm else means
    found = [
        factors[place]
        * einsum(
            outputs[:, layer],
            w_o(model, layer),
            "task head d, head d d_model -> task head d_model",
        )
        for place, layer in enumerate(layers)
    ]
    return torch.stack(found, dim=1)


def multipliers(
    model: Any, episodes: Sequence[AnyEpisode], found: Activations
) -> Float[Tensor, "example layer d_model"]:
    """Return what a prompt's heads are multiplied by, behind ``W_O``, when they are added.

    It is 1 in most models, up to rounding. What attention adds to the residual stream at the last
    token is this times ``z @ W_O + b_O``.

    Args:
        model: A model with ``blocks[l].attn.W_O``.
        episodes: The episodes.
        found: Their activations at the hook point ``z``.

    Raises:
        ValueError: If what attention adds is not the sum of the heads' outputs.
    """
    with suppress(AttributeError, NotImplementedError):
        through = _through(model, found)
        added = _as_added(model, episodes, found.layers)
        if added is not None:
            factors, is_norm = added
            scale = _root_mean_square(model, through) if is_norm else torch.ones_like(through)
            return factors / scale
    raise _not_the_sum(model, "heads cannot be told apart in it")


def _not_the_sum(model: Any, so: str) -> ValueError:
    return ValueError(
        f"what attention adds to the residual stream of {model_name(model)} is not the sum of its "
        f"heads' outputs through W_O, so {so}"
    )


_FITTED = 4
"""Prompts that the factors of attention are fitted to: they are the model's, the same for all."""


def _as_added(
    model: Any, episodes: Sequence[AnyEpisode], layers: Sequence[int]
) -> tuple[Float[Tensor, "layer d_model"], bool] | None:
    """Return what heads' projected outputs are multiplied by, and whether a norm divides them.

    The factors are fitted to what attention adds to the residual stream; None if they do not fit.
    """

    def read(hook: str) -> Activations:
        return collect(model, some, hook=hook, layers=layers)

    some, dtype = episodes[:: -(-len(episodes) // _FITTED) or 1], mask_dtype(model)
    through, added = _through(model, read("z")), read("attn_out").values
    allowed = (1e-3 if dtype == torch.float32 else 0.05) * added.norm(dim=(0, 2))
    if all(hook_name("resid_mid", layer) in model.hook_dict for layer in layers):
        before, after = read("resid_pre").values, read("resid_mid").values
        rounding = 4 * torch.finfo(dtype).eps * after.norm(dim=(0, 2))
        if ((before + added - after).norm(dim=(0, 2)) > allowed + rounding).any():
            return None
    # A multiplier is one number; a norm divides by the root mean square, and has weights.
    scales = through.new_ones(1, 1, 1), _root_mean_square(model, through)
    for is_norm, scale, axes in ((False, scales[0], (0, 2)), (True, scales[1], (0,))):
        unit = through / scale
        square = unit.square().sum(dim=axes, keepdim=True)
        factors = torch.where(square > 0, (unit * added).sum(dim=axes, keepdim=True) / square, 1.0)
        if ((factors * unit - added).norm(dim=(0, 2)) <= allowed).all():
            return factors[0].expand(added.shape[1:]), is_norm
    return None


def _through(model: Any, found: Activations) -> Float[Tensor, "example layer d_model"]:
    """Return what the heads' outputs project to together.

    Raises:
        AttributeError: If the model's attention has no ``W_O``.
        NotImplementedError: The same.
    """
    projected = []
    for place, layer in enumerate(found.layers):
        weights, bias = w_o(model, layer), getattr(model.blocks[layer].attn, "b_O", None)
        one = einsum(found.values[:, place], weights, "row head d, head d d_model -> row d_model")
        projected.append(one if bias is None else one + bias.detach().to(one))
    return torch.stack(projected, dim=1)


def w_o(model: Any, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """Return the output weights of a layer's heads, float32 on the CPU.

    Raises:
        AttributeError: If the model's attention has none.
        NotImplementedError: The same.
    """
    weights: Tensor = model.blocks[layer].attn.W_O.detach().to("cpu", torch.float32)
    return weights


def _root_mean_square(
    model: Any, projected: Float[Tensor, "example layer d_model"]
) -> Float[Tensor, "example layer 1"]:
    epsilon = float(getattr(model.cfg, "eps", 1e-6))
    return (projected.square().mean(dim=2, keepdim=True) + epsilon).sqrt()


def _means(
    values: Float[Tensor, "example layer head d"], found: Activations
) -> Float[Tensor, "task layer head d"]:
    """Return each task's mean."""
    own = (values[found.labels == index] for index in range(len(found.tasks)))
    return torch.stack([some.mean(dim=0) for some in own])
