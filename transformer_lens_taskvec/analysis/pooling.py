"""Pooled representations: the mean input embedding of a prompt, where only its words count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transformer_lens_taskvec.activations import Activations, Source, label
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.forward import run_until
from transformer_lens_taskvec.models.protocol import device_of, hook_name, inference, model_name
from transformer_lens_taskvec.models.tokens import batches, encode, pad_id
from transformer_lens_taskvec.prompts import Episode


def input_embeddings(
    model: Any, episodes: Sequence[Episode], *, prepend_bos: bool = False
) -> Activations:
    """The mean over each prompt's tokens of what goes into the first block: words, not order.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        episodes: The episodes; their order is kept.
        prepend_bos: Whether to put a beginning-of-sequence token before each prompt.

    Returns:
        ``[example, 1, d_model]``, under layer 0.
    """
    encoded = encode(model, [episode.prompt for episode in episodes], prepend_bos=prepend_bos)
    values = torch.zeros(len(encoded), 1, int(model.cfg.d_model))
    name, device = hook_name("resid_pre", 0), device_of(model)
    with inference(model):
        for batch in batches(
            encoded, batch_size=32, pad=pad_id(model), same_length=not capabilities(model).pads
        ):
            real = batch.mask[..., None].float()
            rows = list(batch.rows)

            def average(
                activation: Tensor, hook: Any = None, real: Tensor = real, rows: Any = rows
            ) -> None:
                total = (activation.to("cpu", torch.float32) * real).sum(dim=1)
                values[rows, 0] = total / real.sum(dim=1)

            run_until(
                model, batch.tokens.to(device), batch.mask.to(device), [(name, average)], name
            )
    tasks, labels = label(episodes)
    source = Source(model_name(model), "resid_pre", -1, episodes[0].template.example, prepend_bos)
    return Activations(values, labels, tasks, (0,), source)
