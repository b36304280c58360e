"""Pooled representations: the mean input embedding of a prompt, which ignores word order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_taskvec.activations import Activations, labelled
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.carried import warn_of_hooks
from transformer_lens_taskvec.models.forward import run_until
from transformer_lens_taskvec.models.limits import check_lengths
from transformer_lens_taskvec.models.protocol import device_of, hook_name, inference
from transformer_lens_taskvec.models.readout import Keep
from transformer_lens_taskvec.models.tokens import batches, encode_prompts, pad_id
from transformer_lens_taskvec.prompts import AnyEpisode


def input_embeddings(model: Any, episodes: Sequence[AnyEpisode]) -> Activations:
    """Return the mean over each prompt's tokens of the input to the first block.

    It depends on the prompt's words and not on their order.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        episodes: The episodes; their order is kept.

    Returns:
        ``[example, 1, d_model]``, recorded as layer 0.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 2, 1, seed=0)
        >>> tv.analysis.input_embeddings(model, episodes).values.shape
        torch.Size([12, 1, 64])
    """
    encoded, bos = encode_prompts(model, episodes)
    values = torch.zeros(len(encoded), 1, int(model.cfg.d_model))
    name, device = hook_name("resid_pre", 0), device_of(model)
    check_lengths(model, encoded)
    with inference(model):
        can = capabilities(model)
        if can.hooked:
            warn_of_hooks(model, stacklevel=2)
        for batch in batches(
            encoded,
            batch_size=32,
            pad=pad_id(model),
            same_length=not can.pads,
            apart=can.apart,
        ):
            there, embedded = batch.to(device), Keep()
            run_until(model, there.tokens, there.padding, [(name, embedded)], name)
            kept = embedded.take().to("cpu", torch.float32)
            values[list(batch.rows), 0] = _mean_of_real(kept, batch.mask)
    return labelled(model, episodes, values, hook="resid_pre", layers=(0,), bos=bos)


def _mean_of_real(
    activation: Float[Tensor, "row pos d"], mask: Bool[Tensor, "row pos"]
) -> Float[Tensor, "row d"]:
    real: Int[Tensor, "row pos 1"] = rearrange(mask, "row pos -> row pos 1").int()
    total = reduce(activation * real, "row pos d -> row d", "sum")
    return total / reduce(real, "row pos 1 -> row 1", "sum")
