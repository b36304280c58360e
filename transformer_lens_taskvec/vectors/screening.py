"""Estimates of every head's effect from one backward pass: attribution patching.

To first order, replacing a head's output ``z`` by ``patch`` changes the answer's log-probability by
``(patch - z) . gradient``, with the gradient in the unedited prompt (Nanda 2023). TransformerLens'
``attribution_patch`` has the same estimate for pairs of prompts of one length, one pair at a time;
a task's mean is no prompt, so the gradients are taken here, of padded batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.statistics import means_by_query
from transformer_lens_taskvec.activations import label
from transformer_lens_taskvec.interventions.packed import default_max_tokens
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.forward import run_prompts
from transformer_lens_taskvec.models.limits import check_lengths
from transformer_lens_taskvec.models.protocol import device_of, hook_name, inference, model_name
from transformer_lens_taskvec.models.tokens import (
    Position,
    PromptBatch,
    batches,
    encode_answers,
    encode_prompts,
    pad_id,
    row_indices,
)
from transformer_lens_taskvec.prompts import AnyEpisode

_SHARE = 4
"""A pass with gradients keeps all layers' activations, so it takes this part of the tokens."""


def check_screen(model: Any, episodes: Sequence[AnyEpisode], screen: int, n_heads: int) -> None:
    """Raise ``ValueError`` if so many heads, or these answers, or this model cannot be screened."""
    if isinstance(screen, bool) or not 1 <= screen <= n_heads:
        raise ValueError(
            f"screen is {screen!r}; it must be from 1 to {n_heads}, the number of heads of "
            f"{model_name(model)}, or None to measure all"
        )
    if isinstance(episodes[0].prompt, Tensor):
        raise ValueError(
            "screen is for answers of tokens, and these answers are numbers; measure all heads "
            "with screen=None"
        )
    if capabilities(model).hooked:
        raise ValueError(
            f"{model_name(model)} carries hooks of yours, written for passes without gradients; "
            "remove them (model.reset_hooks(including_permanent=True)), or use screen=None"
        )


def estimated_effects(
    model: Any,
    episodes: Sequence[AnyEpisode],
    patches: Mapping[str, Float[Tensor, "layer head d_head"]],
    *,
    position: Position = -1,
    max_tokens: int | None = None,
    progress: bool = False,
) -> Float[Tensor, "task layer head"]:
    """Return each head's estimated effect on the answer's probability, the mean over queries.

    Args:
        model: A model with attention heads (``attn.hook_z``), through which gradients flow.
        episodes: The episodes, with answers of tokens.
        patches: By task, what replaces each head's output.
        position: Where the output is replaced, as for :func:`inject`.
        max_tokens: The most tokens per pass; by default from the model and the free memory.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If gradients do not flow, or are not finite.
    """
    (prompts, _), answers = encode_prompts(model, episodes), encode_answers(model, episodes)
    check_lengths(model, prompts, answers)
    can, device = capabilities(model), device_of(model)
    # Nothing is read after an answer's last token.
    whole = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    tokens = max_tokens or default_max_tokens(model, can) // _SHARE
    parts: list[tuple[list[int], Tensor]] = []
    with (
        inference(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        tqdm(total=len(whole), disable=not progress, leave=False) as bar,
    ):
        for batch in batches(
            whole,
            batch_size=max(1, tokens // max(map(len, whole))),
            pad=pad_id(model),
            same_length=not can.pads,
            apart=can.apart,
        ):
            rows = list(batch.rows)
            wanted = [answers[row] for row in rows]
            changed = _changed(position, batch.mask, torch.tensor([len(ids) for ids in wanted]))
            patch = torch.stack([patches[episodes[row].task] for row in rows]).to(device)
            found = _of_batch(model, batch.to(device), wanted, patch, changed.to(device))
            parts.append((rows, found.cpu()))
            bar.update(len(rows))
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    estimates = torch.cat([found for _, found in parts])[order]
    if not bool(estimates.isfinite().all()) or not bool(estimates.any()):
        raise ValueError(
            f"gradients of {model_name(model)} are zero or not finite, so its heads cannot be "
            "screened; try float32 or bfloat16, or measure all heads with screen=None"
        )
    tasks, labels = label(episodes)
    queries = torch.tensor([episode.query_id for episode in episodes])
    by_head = rearrange(estimates, "example layer head -> layer head example")
    own = [labels == index for index in range(len(tasks))]
    return torch.stack(
        [means_by_query(by_head[..., rows], queries[rows]).mean(dim=-1).float() for rows in own]
    )


def _of_batch(
    model: Any,
    batch: PromptBatch,
    answers: Sequence[Sequence[int]],
    patch: Float[Tensor, "row layer head d_head"],
    changed: Bool[Tensor, "row pos"],
) -> Float[Tensor, "row layer head"]:
    """Return the estimated effects on the probability of a batch's answers, which end its rows."""
    outputs: list[Tensor] = []
    nudges: list[Tensor] = []

    def nudge(z: Tensor, hook: Any = None) -> Tensor:
        # Of a sum with zeros the gradient is z's, whether or not the weights require any.
        outputs.append(z.detach())
        nudges.append(torch.zeros_like(outputs[-1], requires_grad=True))
        return z + nudges[-1]

    layers = range(patch.shape[1])
    with _last_logits(model, max(map(len, answers))):
        logits = run_prompts(
            model, batch.tokens, batch.padding, [(hook_name("z", layer), nudge) for layer in layers]
        )
    logp = torch.stack(
        [
            row[-len(ids) :].float().log_softmax(dim=-1)[range(len(ids)), list(ids)].sum()
            for row, ids in zip(logits, answers, strict=True)
        ]
    )
    if not logp.requires_grad:
        raise ValueError(
            f"no gradients flow through the passes of {model_name(model)}, so its heads cannot be "
            "screened; measure all heads with screen=None"
        )
    gradients = torch.autograd.grad(logp.sum(), nudges, materialize_grads=True)
    by_layer = [
        _first_order(patch[:, layer], outputs[layer], gradients[layer], changed) for layer in layers
    ]
    # The gradient of P is P times that of log P, which does not underflow.
    probability = rearrange(logp.detach().double().exp(), "row -> row 1 1")
    return probability * torch.stack(by_layer, dim=1)


def _first_order(
    patch: Float[Tensor, "row head d_head"],
    z: Float[Tensor, "row pos head d_head"],
    gradient: Float[Tensor, "row pos head d_head"],
    changed: Bool[Tensor, "row pos"],
) -> Float[Tensor, "row head"]:
    """Return ``(patch - z) . gradient`` of each head, summed over the changed positions."""
    change = rearrange(patch, "row head d -> row 1 head d") - z.float()
    by_position = einsum(change, gradient.float(), "row pos head d, row pos head d -> row pos head")
    here = rearrange(changed, "row pos -> row pos 1")
    total: Tensor = by_position.masked_fill(~here, 0.0).sum(dim=1)
    return total


def _changed(
    position: Position, mask: Bool[Tensor, "row pos"], answer_lengths: Int[Tensor, " row"]
) -> Bool[Tensor, "row pos"]:
    """Return which tokens are changed, of left-padded prompts with their answers but the last."""
    if position is None:
        return mask
    before_end = repeat(answer_lengths - 1, "row -> row 1")
    lengths = (mask.sum(dim=1) - answer_lengths + 1).tolist()
    columns = row_indices(position, lengths, mask.shape[1]) - before_end
    return torch.zeros_like(mask).scatter(1, columns, True)


@contextmanager
def _last_logits(model: Any, n: int) -> Iterator[None]:
    """Make logits at the last ``n`` positions only: a large vocabulary's would fill the memory."""

    def shorten(module: Any, args: Any) -> Any:
        ends = args and isinstance(args[0], Tensor) and args[0].ndim == 3
        return (args[0][:, -n:], *args[1:]) if ends else None

    unembed = getattr(model, "unembed", None)
    if unembed is None:
        yield
        return
    handle = unembed.register_forward_pre_hook(shorten)
    try:
        yield
    finally:
        handle.remove()
