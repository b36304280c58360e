"""Beam search by transformers' own ``generate``, on the Hugging Face model in a bridge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from einops import repeat
from transformers import GenerationConfig

from transformer_lens_taskvec.models.decoding import Decoding
from transformer_lens_taskvec.models.forward import Hooks
from transformer_lens_taskvec.models.protocol import model_name
from transformer_lens_taskvec.models.tokens import PromptBatch, pad_id


def check_beams(model: Any) -> None:
    """Raise ``ValueError`` unless the model has one inside that searches beams."""
    if not hasattr(getattr(model, "original_model", None), "generate"):
        raise ValueError(
            f"config asks for beams, and {model_name(model)} is a {type(model).__name__}: beams "
            "are searched by the Hugging Face model in a TransformerBridge. Load it as one, or "
            "leave num_beams out"
        )


def search_beams(
    model: Any,
    prompts: PromptBatch,
    decoding: Decoding,
    hooks: Callable[[PromptBatch, int], Hooks],
    *,
    use_cache: bool,
) -> list[list[int]]:
    """Return the tokens of each prompt's best beam, up to its end.

    Args:
        model: A bridge.
        prompts: Whole prompts, on the model's device.
        decoding: With the number of beams.
        hooks: ``(rows, seen)``: the hooks of a pass over ``rows`` from position ``seen`` on.
        use_cache: Whether there is a KV cache.
    """
    n, width = decoding.n_beams, prompts.tokens.shape[1]
    beams = PromptBatch(
        repeat(prompts.tokens, "row pos -> (row beam) pos", beam=n),
        repeat(prompts.mask, "row pos -> (row beam) pos", beam=n),
        tuple(row for row in prompts.rows for _ in range(n)),
        tuple(length for length in prompts.lengths for _ in range(n)),
    )
    hf_model, pad = model.original_model, pad_id(model)
    config = GenerationConfig(
        **{
            **decoding.config.to_diff_dict(),
            "max_new_tokens": decoding.max_new_tokens,
            "eos_token_id": list(decoding.ends) or None,
            "pad_token_id": pad,
            "stop_strings": decoding.stop_texts or None,
            "use_cache": use_cache,
        }
    )
    kept = hf_model.generation_config
    # Or its fields would fill those that are None.
    hf_model.generation_config = GenerationConfig()
    try:
        with _in_each_pass(model, beams, width, hooks, use_cache=use_cache):
            found = hf_model.generate(
                prompts.tokens,
                attention_mask=prompts.mask.long(),
                generation_config=config,
                stopping_criteria=[stop for stop in decoding.stops if not isinstance(stop, str)],
                tokenizer=model.tokenizer,
            )
    finally:
        hf_model.generation_config = kept
    return [_until_end(ids, decoding, pad) for ids in found[:, width:].tolist()]


@contextmanager
def _in_each_pass(
    model: Any,
    beams: PromptBatch,
    width: int,
    hooks: Callable[[PromptBatch, int], Hooks],
    *,
    use_cache: bool,
) -> Iterator[None]:
    """Hook each pass of the Hugging Face model by the positions that it covers."""
    n_passes = 0
    with ExitStack() as during:

        def enter(module: Any, args: Any) -> None:
            nonlocal n_passes
            seen = width + n_passes - 1 if n_passes and use_cache else 0
            during.enter_context(model.hooks(fwd_hooks=list(hooks(beams, seen))))
            n_passes += 1

        def leave(module: Any, args: Any, output: Any) -> None:
            during.close()

        handles = [
            model.original_model.register_forward_pre_hook(enter),
            model.original_model.register_forward_hook(leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _until_end(ids: list[int], decoding: Decoding, pad: int) -> list[int]:
    """Return tokens up to the first that ends them, without padding."""
    ends = [place for place, one in enumerate(ids) if one in decoding.ends]
    if ends:
        return ids[: ends[0] + 1]
    # What another condition ended is filled up too.
    while decoding.stops and len(ids) > 1 and ids[-1] == pad:
        ids = ids[:-1]
    return ids
