"""Continuations of prompts under interventions: greedy, sampled, or the best of beams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, overload

from transformers import GenerationConfig

from transformer_lens_taskvec.activations import Observe
from transformer_lens_taskvec.interventions.generated import (
    Continuations,
    Request,
    continuations,
    request_of,
)
from transformer_lens_taskvec.interventions.intervention import Intervention
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.carried import taking_along, warn_of_hooks
from transformer_lens_taskvec.models.decoding import Decoding, Stop, decoding_of
from transformer_lens_taskvec.models.limits import check_lengths
from transformer_lens_taskvec.models.protocol import inference
from transformer_lens_taskvec.prompts import AnyEpisode, PromptTemplate

__all__ = ["Continuations", "generate"]


@overload
def generate(
    model: Any,
    prompts: Sequence[str | AnyEpisode],
    interventions: Variant = (),
    *,
    max_new_tokens: int | None = None,
    first: int | None = 0,
    decay: float = 1.0,
    stop: Stop | Sequence[Stop] | None = None,
    temperature: float = 0.0,
    config: GenerationConfig | None = None,
    seed: int = 0,
    template: PromptTemplate | None = None,
    observe: None = None,
    scores: Literal[False] = False,
    streamer: Any = None,
    use_cache: bool | None = None,
) -> list[str]: ...


@overload
def generate(
    model: Any,
    prompts: Sequence[str | AnyEpisode],
    interventions: Variant = (),
    *,
    max_new_tokens: int | None = None,
    first: int | None = 0,
    decay: float = 1.0,
    stop: Stop | Sequence[Stop] | None = None,
    temperature: float = 0.0,
    config: GenerationConfig | None = None,
    seed: int = 0,
    template: PromptTemplate | None = None,
    observe: Observe,
    scores: bool = False,
    streamer: Any = None,
    use_cache: bool | None = None,
) -> Continuations: ...


@overload
def generate(
    model: Any,
    prompts: Sequence[str | AnyEpisode],
    interventions: Variant = (),
    *,
    max_new_tokens: int | None = None,
    first: int | None = 0,
    decay: float = 1.0,
    stop: Stop | Sequence[Stop] | None = None,
    temperature: float = 0.0,
    config: GenerationConfig | None = None,
    seed: int = 0,
    template: PromptTemplate | None = None,
    observe: None = None,
    scores: Literal[True],
    streamer: Any = None,
    use_cache: bool | None = None,
) -> Continuations: ...


def generate(
    model: Any,
    prompts: Sequence[str | AnyEpisode],
    interventions: Variant = (),
    *,
    max_new_tokens: int | None = None,
    first: int | None = 0,
    decay: float = 1.0,
    stop: Stop | Sequence[Stop] | None = None,
    temperature: float = 0.0,
    config: GenerationConfig | None = None,
    seed: int = 0,
    template: PromptTemplate | None = None,
    observe: Observe | None = None,
    scores: bool = False,
    streamer: Any = None,
    use_cache: bool | None = None,
) -> list[str] | Continuations:
    r"""Return continuations of prompts under interventions.

    An intervention acts at its positions of the prompt, and on the ``first`` new tokens after it:
    none by default, so with a KV cache in the first pass only.

    Each prompt's sampling has a random stream of its own, from ``seed``, its tokens, and how many
    times it came before in the list. So a continuation does not depend on the other prompts, and
    the same prompt given twice is sampled twice.

    Args:
        model: Any model with TransformerLens' hook API and a tokenizer.
        prompts: Texts, or episodes. An episode's template decides whether a BOS precedes it, a
            text's tokenizer otherwise. Lengths may differ.
        interventions: Applied together, in order. Any other pair of a hook name and a hook function
            is called in every pass, with the positions of that pass.
        max_new_tokens: The most tokens per continuation; here or in ``config``.
        first: On how many new tokens interventions also act; None for all.
        decay: The factor of their scales per new token: a vector acts with its scale on the prompt,
            with ``decay`` times its scale on the first new token, ``decay**2`` on the second. What
            has no scale, such as an ablation, stays.
        stop: Texts before which a continuation ends, or ``transformers.StoppingCriteria``, after
            whose token; it always ends before the end-of-sequence token.
        temperature: 0 for greedy decoding, otherwise the divisor of the logits for sampling.
        config: A ``transformers.GenerationConfig`` in place of ``temperature``, with ``do_sample``,
            ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``, ``num_beams`` and others. A
            field that is None is off, so ``top_k`` is not 50 here. Beams need a TransformerBridge.
        seed: Seed of the sampling.
        template: How each text becomes a prompt, such as ``PromptTemplate.chat(tokenizer)``.
        observe: Which activations to return too, at the last prompt token and every new token.
        scores: Whether to return the scores of new tokens too.
        streamer: Is given tokens as they come, such as ``transformers.TextStreamer``; for one
            prompt.
        use_cache: Whether to keep a KV cache; by default if the model supports it.

    Returns:
        The continuations' texts, without the prompts. With ``observe`` or ``scores``,
        :class:`Continuations`.

    Raises:
        ValueError: If there are no prompts, or one text instead of a list, a prompt has no tokens,
            a number is out of range, an intervention does not fit the model, a field of ``config``
            would not act, a template is given for episodes, or something is asked for that the
            model does not support: a cache, beams, activations or scores of beams, or a stream of
            several prompts.

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
        >>> from transformers import GenerationConfig
        >>> nucleus = GenerationConfig(do_sample=True, top_p=0.9, max_new_tokens=5)
        >>> len(tv.generate(model, 3 * prompts, edits, config=nucleus, seed=1))
        3
    """
    request = request_of(
        model,
        prompts,
        interventions,
        decoding_of(
            model,
            config,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop,
        ),
        first=first,
        decay=decay,
        template=template,
        observe=observe,
        scores=scores,
        streamer=streamer,
        use_cache=use_cache,
    )
    with inference(model), taking_along(model, Intervention) as carried:
        if capabilities(model).hooked:
            warn_of_hooks(model, stacklevel=2)
        found = continuations(model, request, carried)
    return list(found.texts) if observe is None and not scores else found


def answers(
    model: Any,
    prompts: Sequence[str | AnyEpisode],
    interventions: Variant = (),
    *,
    config: GenerationConfig | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Stop | Sequence[Stop] | None = None,
    use_cache: bool | None = None,
) -> list[str]:
    """Return continuations under interventions that act as where answers are scored.

    That is, those at every position act on the new tokens too. The arguments are those of
    :func:`generate`. What there is to say of hooks is said where answers are scored.
    """
    decoding = decoding_of(
        model,
        config,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop=stop,
    )
    request = request_of(model, prompts, interventions, decoding, use_cache=use_cache)
    return list(_run(model, replace(request, everywhere=True)).texts)


def _run(model: Any, request: Request) -> Continuations:
    with inference(model), taking_along(model, Intervention) as carried:
        return continuations(model, request, carried)


def continue_ids(
    model: Any,
    encoded: Sequence[Sequence[int]],
    decoding: Decoding,
    interventions: Variant = (),
) -> list[list[int]]:
    """Return the new tokens after prompts that are token ids, with the one that ends each.

    Interventions act as where answers are scored: those at every position on new tokens too.

    Args:
        model: As for :func:`generate`.
        encoded: The token ids of each prompt.
        decoding: How the continuations are decoded.
        interventions: As for :func:`generate`, checked and without separators.
    """
    check_lengths(model, encoded, decoding.max_new_tokens)
    request = Request((), (), encoded, interventions, decoding, everywhere=True)
    return [list(ids) for ids in _run(model, request).tokens]
