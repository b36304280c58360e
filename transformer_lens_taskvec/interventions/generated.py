"""What a generation is asked for, checked before any pass, and what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import Observe
from transformer_lens_taskvec.interventions.checks import check_variants
from transformer_lens_taskvec.interventions.continued import Continued, Work, hooks_of_pass
from transformer_lens_taskvec.interventions.packed import default_max_tokens
from transformer_lens_taskvec.interventions.variants import (
    Variant,
    acts_at_end,
    at_separators,
    placed,
)
from transformer_lens_taskvec.models.beams import check_beams
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.decoding import Decoding
from transformer_lens_taskvec.models.forward import Hooks
from transformer_lens_taskvec.models.layouts import check_readable
from transformer_lens_taskvec.models.limits import check_lengths
from transformer_lens_taskvec.models.prefixes import fewest_saved, in_steps, steps
from transformer_lens_taskvec.models.protocol import device_of
from transformer_lens_taskvec.models.tokens import PromptBatch, encode, encode_prompts
from transformer_lens_taskvec.prompts import AnyEpisode, PromptTemplate


@dataclass(frozen=True, repr=False)
class Continuations(Shown):
    """Continuations with what the model computed on the way, one entry per prompt.

    Attributes:
        prompts: The texts that were continued, without a BOS.
        texts: The continuations, as :func:`generate` returns them alone.
        tokens: Their token ids, with those that ended them.
        logprobs: ``[token]``: the log-probability of each new token under the model as it ran, in
            nats, before any change of the distribution.
        scores: ``[token, vocab]``, float32: the logits by which each new token was chosen, after
            processors and warpers; None if not asked for.
        activations: ``[1 + token, layer, d_model]``, float32 on the CPU, with interventions: at the
            last prompt token, then at each new token; None if not asked for. The first predicts
            the first new token.
        layers: The layers of ``activations``, counted from 0.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> prompts, observe = ["example:01011 11010->"], tv.Observe(layers=[1, 2])
        >>> found = tv.generate(model, prompts, max_new_tokens=5, observe=observe)
        >>> len(found.tokens[0]), found.activations[0].shape
        (5, torch.Size([6, 2, 64]))
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[Float[Tensor, " _token"], ...]
    scores: tuple[Float[Tensor, "_token vocab"], ...] | None = None
    activations: tuple[Float[Tensor, "_step layer ..."], ...] | None = None
    layers: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per prompt: ``prompt, continuation, n_tokens, logprob`` (mean, nats)."""
        return pd.DataFrame(
            {
                "prompt": self.prompts,
                "continuation": self.texts,
                "n_tokens": list(map(len, self.tokens)),
                "logprob": [float(own.mean()) for own in self.logprobs],
            }
        )

    def __repr__(self) -> str:
        kept = "" if self.scores is None else ", scores"
        if self.activations is not None:
            kept += f", activations of layers {list(self.layers)}"
        return f"Continuations({len(self)} prompts, {sum(map(len, self.tokens))} tokens{kept})"


@dataclass(frozen=True)
class Request:
    """What :func:`generate` is asked for, checked; made by :func:`request_of`.

    Attributes:
        texts: The prompts' texts.
        episodes: The prompts, if they are episodes.
        encoded: The prompts' tokens.
        interventions: As for :func:`generate`, as are the others.
        decoding: How the continuations are decoded.
        first: On how many new tokens interventions also act; None for all.
        decay: The factor of their scales per new token.
        observe: What is observed.
        names: The full names of its hook points.
        scores: Whether scores are kept.
        streamer: Is given tokens as they come.
        use_cache: Whether to keep a KV cache; None if the model supports it.
        everywhere: Whether interventions at every position act on all new tokens, as they do where
            answers are scored.
    """

    texts: Sequence[str]
    episodes: Sequence[AnyEpisode]
    encoded: Sequence[Sequence[int]]
    interventions: Variant
    decoding: Decoding
    first: int | None = 0
    decay: float = 1.0
    observe: Observe | None = None
    names: Sequence[str] = ()
    scores: bool = False
    streamer: Any = None
    use_cache: bool | None = None
    everywhere: bool = False

    @property
    def n_read(self) -> int:
        """The most tokens after a prompt, as if nothing were read after the last."""
        return self.decoding.max_new_tokens + (self.observe is not None)


def request_of(
    model: Any,
    prompts: Sequence[str | AnyEpisode],
    interventions: Variant,
    decoding: Decoding,
    *,
    first: int | None = 0,
    decay: float = 1.0,
    template: PromptTemplate | None = None,
    observe: Observe | None = None,
    scores: bool = False,
    streamer: Any = None,
    use_cache: bool | None = None,
) -> Request:
    """Return what :func:`generate` is asked for, by its own arguments.

    Raises:
        ValueError: As for :func:`generate`.
    """
    texts, episodes, encoded = _encoded(model, prompts, template)
    interventions = list(interventions)  # a generator can be read only once
    check_variants(model, [interventions])
    if first is not None and (first < 0 or int(first) != first):
        raise ValueError(
            f"first is {first}; it must be a whole number, 0 or more, or None for all new tokens"
        )
    if not (isfinite(decay) and decay > 0) or (decay != 1 and first == 0):
        raise ValueError(
            f"decay is {decay} and first {first}; decay must be a finite number above 0, and other "
            "than 1 only with first above 0, or None for all new tokens"
        )
    beams = decoding.n_beams > 1
    if beams:
        check_beams(model)
    if streamer is not None and (len(prompts) > 1 or beams):
        raise ValueError(
            f"streamer is given with {len(prompts)} prompts and {decoding.n_beams} beam(s); tokens "
            "stream from one prompt without beams"
        )
    if beams and (observe is not None or scores):
        raise ValueError(
            "observe and scores are of one continuation as it is made, and beams keep several; "
            "leave num_beams out"
        )
    names = [] if observe is None else check_readable(model, observe.layers, observe.hook)[1]
    asked = decoding.config.use_cache if use_cache is None else use_cache
    found = Request(
        texts,
        episodes,
        encoded,
        interventions,
        decoding,
        first,
        decay,
        observe,
        names,
        scores,
        streamer,
        asked,
    )
    check_lengths(model, encoded, found.n_read)
    return found


def continuations(model: Any, request: Request, carried: Variant = ()) -> Continuations:
    """Return what is asked for, inside ``inference``.

    Args:
        model: The model.
        request: From :func:`request_of`.
        carried: Interventions that were taken off the model, which act first, on prompts only.

    Raises:
        ValueError: If a cache is asked for that the model does not support, or as for
            :func:`at_separators`.
    """
    decoding, encoded = request.decoding, request.encoded
    can = capabilities(model)
    longest = max(map(len, encoded))
    # The length from which on a prompt's numbers may depend on others in its batch.
    apart = None if can.apart is None else can.apart - request.n_read + 1
    cached = can.caches and (apart is None or longest <= apart)
    if request.use_cache and not cached:
        reason = can.reason or f"prompts with {request.n_read} tokens exceed {can.why_apart}"
        raise ValueError(f"use_cache is True, but {reason}; leave it out")
    [given] = at_separators(model, [(*carried, *request.interventions)], request.episodes)
    edits = [placed(hook, device_of(model)) for hook in given]
    caching = cached if request.use_cache is None else request.use_cache
    shares = caching and decoding.n_beams == 1 and all(acts_at_end(hook) for hook in edits)
    plan = steps(
        encoded,
        budget=max(default_max_tokens(model, can) // decoding.n_beams, longest + request.n_read),
        can=replace(can, apart=apart),
        # Padding between tokens counts where attention does by index.
        fewest=fewest_saved(model) if shares and can.apart is None else None,
    )

    def hooks(batch: PromptBatch, seen: int) -> Hooks:
        before, own = edits[: len(carried)], edits[len(carried) :]
        everywhere = request.everywhere
        first, decay = request.first, request.decay
        return [
            *hooks_of_pass(before, batch, seen, everywhere=everywhere),
            *hooks_of_pass(own, batch, seen, first=first, decay=decay, everywhere=everywhere),
        ]

    work = Work(
        model,
        decoding,
        encoded,
        hooks=hooks,
        names=request.names,
        keeps_scores=request.scores,
        streamer=request.streamer,
        use_cache=caching,
    )
    found: dict[int, Continued] = {}
    for batch, past in in_steps(model, plan):
        found |= zip(batch.rows, work.continued(batch, past), strict=True)
    each = [found[row] for row in range(len(encoded))]
    layers = tuple(int(name.split(".")[1]) for name in request.names)
    return Continuations(
        prompts=tuple(request.texts),
        texts=tuple(decoding.text(model, one.ids) for one in each),
        tokens=tuple(tuple(one.ids) for one in each),
        logprobs=tuple(torch.tensor(one.logprobs) for one in each),
        scores=tuple(torch.stack(one.scores) for one in each) if request.scores else None,
        activations=tuple(torch.stack(one.activations) for one in each) if layers else None,
        layers=layers,
    )


def _encoded(
    model: Any, prompts: Sequence[str | AnyEpisode], template: PromptTemplate | None
) -> tuple[list[str], list[AnyEpisode], list[Any]]:
    """Return the prompts' texts, the episodes if they are some, and their tokens."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list of at least one text")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts and len(texts) < len(prompts):
        raise ValueError("prompts has both texts and episodes; give one kind")
    episodes = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if episodes:
        if template is not None:
            raise ValueError("template is given, and episodes have templates; leave it out")
        encoded, _ = encode_prompts(model, episodes)
        return [str(episode.prompt) for episode in episodes], episodes, encoded
    if template is None:
        return texts, [], encode(model, texts)
    texts = [template.render((), text) for text in texts]
    return texts, [], encode(model, texts, bos=template.bos)
