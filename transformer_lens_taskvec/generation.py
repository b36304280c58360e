"""Continuations of prompts under interventions, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_taskvec.interventions.checks import check_variants
from transformer_lens_taskvec.interventions.intervention import Intervention
from transformer_lens_taskvec.interventions.packed import (
    Variant,
    default_max_tokens,
)
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.carried import taking_along, warn_of_hooks
from transformer_lens_taskvec.models.forward import new_cache, run_cached, run_prompts
from transformer_lens_taskvec.models.limits import check_lengths
from transformer_lens_taskvec.models.protocol import device_of, inference
from transformer_lens_taskvec.models.tokens import (
    Batch,
    batches,
    decode,
    encode,
    encode_prompts,
    pad_id,
    row_indices,
    token_id,
)
from transformer_lens_taskvec.prompts import AnyEpisode


def generate(
    model: Any,
    prompts: Sequence[str | AnyEpisode],
    interventions: Variant = (),
    *,
    max_new_tokens: int,
    every_token: bool = False,
    stop: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    use_cache: bool | None = None,
) -> list[str]:
    r"""Return continuations of prompts under interventions.

    An intervention acts at its positions of the prompt, and nowhere else unless ``every_token`` is
    True: with a KV cache, in the first pass only.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        prompts: Texts, or episodes. An episode's template decides whether a BOS precedes it, a
            text's tokenizer otherwise.
        interventions: Applied together, in order. Any other pair of a hook name and a hook function
            is called in every pass, with the positions of that pass.
        max_new_tokens: The most tokens per continuation.
        every_token: Whether interventions also act on every new token.
        stop: A text before which the continuation ends; it always ends before the end-of-sequence
            token.
        temperature: 0 for greedy decoding, otherwise the divisor of the logits for sampling.
        seed: Seed of the sampling.
        use_cache: Whether to keep a KV cache; by default if the model supports it.

    Returns:
        The continuations, without the prompts.

    Raises:
        ValueError: If there are no prompts, or one text instead of a list, a prompt has no tokens,
            a number is out of range, an intervention does not fit the model, or a cache is asked
            for that the model does not support.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> prompts = ["example:01011 11010->"]
        >>> for task in ("XOR", "OR"):
        ...     edits = vectors.inject(task, layer=1)
        ...     tv.generate(model, prompts, edits, max_new_tokens=8, stop="\n")
        ['10001']
        ['11011']
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list of at least one text")
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens} and temperature {temperature}; they must be at "
            "least 1 and 0"
        )
    interventions = list(interventions)  # a generator can be read only once
    check_variants(model, [interventions])
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts and len(texts) < len(prompts):
        raise ValueError("prompts has both texts and episodes; give one kind")
    encoded = encode(model, texts) if texts else encode_prompts(model, prompts)[0]
    check_lengths(model, encoded, max_new_tokens)
    longest = max(map(len, encoded)) + max_new_tokens
    continuations = [""] * len(prompts)
    generator = torch.Generator().manual_seed(seed)
    with inference(model), taking_along(model, Intervention) as carried:
        can = capabilities(model)
        if can.hooked:
            warn_of_hooks(model, stacklevel=2)
        # The length from which on a prompt's numbers may depend on others in its batch.
        apart = None if can.apart is None else can.apart - max_new_tokens + 1
        cached = can.caches and (apart is None or max(map(len, encoded)) <= apart)
        if use_cache and not cached:
            reason = can.reason or f"prompts with {max_new_tokens} tokens exceed {can.why_apart}"
            raise ValueError(f"use_cache is True, but {reason}; leave it out")
        for batch in batches(
            encoded,
            batch_size=max(1, default_max_tokens(model) // longest),
            pad=pad_id(model),
            same_length=not can.pads,
            apart=apart,
        ):
            continued = _continue(
                model,
                batch.to(device_of(model)),
                [*carried, *interventions],
                max_new_tokens=max_new_tokens,
                every_token=every_token,
                stop=stop,
                choose=lambda logits: _choose(logits, temperature, generator),
                use_cache=cached if use_cache is None else use_cache,
            )
            for row, text in zip(batch.rows, continued, strict=True):
                continuations[row] = text
    return continuations


def _continue(
    model: Any,
    batch: Batch,
    interventions: Variant,
    *,
    max_new_tokens: int,
    every_token: bool,
    stop: str | None,
    choose: Callable[[Tensor], Tensor],
    use_cache: bool,
) -> list[str]:
    tokens, mask = batch.tokens, batch.mask
    end = token_id(model, "eos")
    cache = new_cache(model, len(tokens)) if use_cache else None
    seen = 0
    for _ in range(max_new_tokens):
        hooks = [_from(hook, batch.mask, seen, every_token) for hook in interventions]
        active = [hook for hook in hooks if hook is not None]
        if cache is None:
            logits = run_prompts(model, tokens, mask, active)
        else:
            logits = run_cached(model, tokens[:, seen:], mask, cache, active)
            seen = tokens.shape[1]
        chosen = choose(logits[:, -1])
        tokens = torch.cat([tokens, rearrange(chosen, "row -> row 1")], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        new = tokens[:, batch.tokens.shape[1] :]
        texts = [_text(model, ids, end, stop) for ids in new.tolist()]
        if all(finished for _, finished in texts):
            break
    return [text for text, _ in texts]


def _from(
    hook: Any, prompt_mask: Bool[Tensor, "row pos"], seen: int, every_token: bool
) -> tuple[str, Callable[..., Any]] | None:
    """Return the hook for a pass over the positions from ``seen`` on, None if it does not act."""
    if not isinstance(hook, Intervention):
        name, hook_function = hook
        return name, hook_function
    if seen and not every_token:
        return None

    intervention = hook

    def act(activation: Tensor, hook: Any = None) -> Tensor:
        n_rows, n_new = activation.shape[:2]
        inside: list[Tensor] = []
        if not seen:
            inside.append(row_indices(intervention.position, prompt_mask))
        if every_token:
            first = max(prompt_mask.shape[1] - seen, 0)
            inside.append(repeat(torch.arange(first, n_new), "at -> row at", row=n_rows))
        return intervention.edit_at(activation, torch.cat(inside, dim=1))

    return intervention.name, act


def _choose(
    logits: Float[Tensor, "row vocab"], temperature: float, generator: torch.Generator
) -> Int[Tensor, " row"]:
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.float().cpu() / temperature).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)


def _text(model: Any, ids: Sequence[int], end: int | None, stop: str | None) -> tuple[str, bool]:
    """Return the continuation so far, and whether it is finished."""
    finished = end is not None and end in ids
    text = decode(model, ids[: ids.index(end)] if finished and end is not None else ids)
    if stop is not None and stop in text:
        return text[: text.index(stop)], True
    return text, finished
