"""Continuations of prompts under interventions, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_taskvec.interventions.checks import check_variants
from transformer_lens_taskvec.interventions.intervention import Intervention
from transformer_lens_taskvec.interventions.packed import default_max_tokens
from transformer_lens_taskvec.interventions.variants import (
    Variant,
    acts_at_end,
    at_separators,
    placed,
)
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.carried import taking_along, warn_of_hooks
from transformer_lens_taskvec.models.forward import new_cache, run_cached, run_prompts
from transformer_lens_taskvec.models.limits import check_lengths
from transformer_lens_taskvec.models.past import Past
from transformer_lens_taskvec.models.prefixes import fewest_saved, in_steps, steps
from transformer_lens_taskvec.models.protocol import device_of, inference
from transformer_lens_taskvec.models.tokens import (
    Batch,
    decode,
    encode,
    encode_prompts,
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
    episodes = [prompt for prompt in prompts if not isinstance(prompt, str)]
    encoded = encode(model, texts) if texts else encode_prompts(model, episodes)[0]
    added = continue_ids(
        model,
        encoded,
        interventions,
        episodes=episodes,
        max_new_tokens=max_new_tokens,
        every_token=every_token,
        stop=stop,
        temperature=temperature,
        seed=seed,
        use_cache=use_cache,
    )
    end = token_id(model, "eos")
    return [_text(model, ids, end, stop) for ids in added]


def continue_ids(
    model: Any,
    encoded: Sequence[Sequence[int]],
    interventions: Variant = (),
    *,
    episodes: Sequence[AnyEpisode] = (),
    max_new_tokens: int,
    every_token: bool = False,
    stop: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    use_cache: bool | None = None,
) -> list[list[int]]:
    """Return the new tokens of :func:`generate`, up to the one that ends each continuation.

    Args:
        model: As for :func:`generate`.
        encoded: The token ids of each prompt.
        interventions: As for :func:`generate`, and checked already.
        episodes: The episodes that the prompts are of, where interventions act at separators.
        max_new_tokens: As for :func:`generate`.
        every_token: As for :func:`generate`.
        stop: As for :func:`generate`.
        temperature: As for :func:`generate`.
        seed: As for :func:`generate`.
        use_cache: As for :func:`generate`.
    """
    check_lengths(model, encoded, max_new_tokens)
    longest = max(map(len, encoded)) + max_new_tokens
    continuations: list[list[int]] = [[] for _ in encoded]
    generator = torch.Generator(device_of(model)).manual_seed(seed)
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
        [given] = at_separators(model, [(*carried, *interventions)], episodes)
        edits = [placed(hook, device_of(model)) for hook in given]
        caching = cached if use_cache is None else use_cache
        at_end = all(acts_at_end(hook) for hook in edits)
        plan = steps(
            encoded,
            budget=max(default_max_tokens(model, can), longest),
            can=replace(can, apart=apart),
            # Padding between tokens counts where attention does by index.
            fewest=fewest_saved(model) if caching and at_end and can.apart is None else None,
        )
        for batch, past in in_steps(model, plan):
            continued = _continue(
                model,
                batch,
                past,
                edits,
                max_new_tokens=max_new_tokens,
                every_token=every_token,
                stop=stop,
                choose=partial(_choose, temperature=temperature, generator=generator),
                use_cache=caching,
            )
            for row, ids in zip(batch.rows, continued, strict=True):
                continuations[row] = ids
    return continuations


def _continue(
    model: Any,
    batch: Batch,
    past: Past | None,
    interventions: Variant,
    *,
    max_new_tokens: int,
    every_token: bool,
    stop: str | None,
    choose: Callable[[Tensor], Tensor],
    use_cache: bool,
) -> list[list[int]]:
    end = token_id(model, "eos")
    cache = new_cache(model, len(batch.rows), past) if use_cache else None
    tokens, seen = batch.tokens, 0
    mask = batch.mask if past is None else torch.cat([past.mask, batch.mask], dim=1)
    added: list[list[int]] = [[] for _ in batch.rows]
    going = dict(enumerate(added))
    for _ in range(max_new_tokens):
        hooks = [_from(hook, batch, seen, every_token) for hook in interventions]
        active = [hook for hook in hooks if hook is not None]
        if cache is None:
            padding = None if batch.padding is None else mask
            logits = run_prompts(model, tokens, padding, active)
        else:
            logits = run_cached(model, tokens[:, seen:], mask, cache, active)
            seen = tokens.shape[1]
        chosen = choose(logits[:, -1])
        tokens = torch.cat([tokens, rearrange(chosen, "row -> row 1")], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        new = chosen.tolist()
        for row, ids in list(going.items()):
            ids.append(new[row])
            if _is_finished(model, ids, end, stop):
                del going[row]
        if not going:
            break
    return added


def _from(
    hook: Any, prompts: Batch, seen: int, every_token: bool
) -> tuple[str, Callable[..., Any]] | None:
    """Return the hook for a pass over the positions from ``seen`` on, None if it does not act."""
    if not isinstance(hook, Intervention):
        name, hook_function = hook
        return name, hook_function
    if seen and not every_token:
        return None

    intervention = hook
    columns = None if seen else prompts.columns(intervention.position)

    def act(activation: Tensor, hook: Any = None) -> Tensor:
        n_rows, n_new = activation.shape[:2]
        inside = [] if columns is None else [columns]
        if every_token:
            first = max(prompts.tokens.shape[1] - seen, 0)
            after = torch.arange(first, n_new, device=activation.device)
            inside.append(repeat(after, "at -> row at", row=n_rows))
        return intervention.edit_at(activation, torch.cat(inside, dim=1))

    return intervention.name, act


def _choose(
    logits: Float[Tensor, "row vocab"], temperature: float, generator: torch.Generator
) -> Int[Tensor, " row"]:
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _is_finished(model: Any, ids: Sequence[int], end: int | None, stop: str | None) -> bool:
    """Return whether the last token ends a continuation."""
    if ids[-1] == end:
        return True
    # A character has up to four tokens; only these can have completed the text.
    return stop is not None and all(
        stop in decode(model, some) for some in (ids[-4 * len(stop) - 8 :], ids)
    )


def _text(model: Any, ids: Sequence[int], end: int | None, stop: str | None) -> str:
    """Return a continuation up to its end."""
    text = decode(model, ids[:-1] if ids[-1] == end else ids)
    return text if stop is None else text.partition(stop)[0]
