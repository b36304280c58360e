"""Activations at all tokens of texts, which dictionaries are trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.carried import warn_of_hooks
from transformer_lens_taskvec.models.forward import run_until
from transformer_lens_taskvec.models.layouts import check_readable
from transformer_lens_taskvec.models.limits import check_lengths
from transformer_lens_taskvec.models.protocol import (
    device_of,
    fingerprint,
    inference,
    model_name,
    revision,
)
from transformer_lens_taskvec.models.readout import Keep
from transformer_lens_taskvec.models.tokens import batches, bos_habit, encode, pad_id
from transformer_lens_taskvec.prompts import AnyEpisode


@dataclass(frozen=True)
class Origin:
    """Where the activations come from that a dictionary was trained on.

    Attributes:
        model: The model's name; None, as all others, where it is not known.
        hook: The hook point within a block.
        layer: The layer, counted from 0.
        weights: A fingerprint of the model's weights.
        revision: The commit of the weights on the model hub.
    """

    model: str | None = None
    hook: str | None = None
    layer: int | None = None
    weights: str | None = None
    revision: str | None = None


@dataclass(frozen=True, repr=False)
class Residuals:
    """Activations at many tokens, in random order of the texts.

    Attributes:
        values: ``[token, d_model]``, on the CPU.
        origin: The model, hook point and layer.

    Example:
        >>> len(Residuals(torch.zeros(3, 4), Origin()))
        3
    """

    values: Float[Tensor, "token d_model"]
    origin: Origin

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        n, width = self.values.shape
        place = f"{self.origin.hook} of layer {self.origin.layer} of {self.origin.model}"
        return f"Residuals({n:,} tokens x {width}, {place})"


def residuals(
    model: Any,
    texts: Sequence[str | AnyEpisode],
    layer: int,
    n_tokens: int = 200_000,
    *,
    hook: str = "resid_post",
    skip: int = 1,
    bos: bool | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Residuals:
    """Return the activations at all tokens of texts, up to a number of tokens.

    A pass ends after the layer, and of each batch only its real tokens are kept, so that memory
    holds the result and one batch.

    Args:
        model: Any model with TransformerLens' hook API.
        texts: Texts, episodes, whose prompts are taken, or both. They come in random order until
            there are enough tokens.
        layer: The layer, counted from 0.
        n_tokens: The most tokens to return; of shorter texts there are fewer.
        hook: The hook point within the block, as TransformerLens names it.
        skip: How many tokens at the beginning of each text are left out. The first token's
            activation is hundreds of times as long as others' in many models, and would be most of
            what a dictionary is trained to reconstruct.
        bos: Whether a BOS stands before texts; None for what the model's tokenizer does by itself.
            Episodes' templates say so themselves.
        dtype: The type of the result; float16 halves its memory.
        batch_size: The most texts per pass.
        seed: Seed of the order of the texts.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If a number is out of range, there are no texts or no tokens, the hook point's
            activation is not ``[batch, pos, d]``, or as for :func:`collect`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> residuals(model, episodes, 1, 500)
        Residuals(500 tokens x 64, resid_post of layer 1 of toy@1500)
    """
    if n_tokens < 1 or skip < 0 or batch_size < 1:
        raise ValueError(
            f"n_tokens is {n_tokens}, skip {skip} and batch_size {batch_size}; they must be at "
            "least 1, at least 0, and at least 1"
        )
    if not texts:
        raise ValueError("texts is empty; give texts or episodes")
    _, [name] = check_readable(model, [layer], hook)
    found: Tensor | None = None
    filled = 0
    with inference(model), tqdm(total=n_tokens, disable=not progress, leave=False) as bar:
        if capabilities(model).hooked:
            warn_of_hooks(model, stacklevel=2)
        rng = random.Random(seed)
        order = rng.sample(list(texts), len(texts))
        for rows in _rows(model, order, name, bos, skip, batch_size, rng):
            if rows.ndim != 2:
                raise ValueError(
                    f"the activation of one token at {name} has shape {tuple(rows.shape[1:])}; "
                    "choose a hook without an axis of heads, such as 'resid_post'"
                )
            if found is None:
                found = torch.empty(n_tokens, rows.shape[1], dtype=dtype)
            kept = rows[: n_tokens - filled]
            found[filled : filled + len(kept)] = kept.to(found)
            filled += len(kept)
            bar.update(len(kept))
            if filled == n_tokens:
                break
    if found is None or not filled:
        raise ValueError(f"no text has more than {skip} token(s), and skip leaves these out")
    place = Origin(model_name(model), hook, int(layer), fingerprint(model), revision(model))
    return Residuals(found if filled == n_tokens else found[:filled].clone(), place)


def _rows(
    model: Any,
    texts: Sequence[str | AnyEpisode],
    name: str,
    bos: bool | None,
    skip: int,
    batch_size: int,
    rng: random.Random,
) -> Iterator[Float[Tensor, "token ..."]]:
    """Yield the activations at the tokens of some texts, a pass at a time."""
    can, device = capabilities(model), device_of(model)
    window = 8 * batch_size  # texts that are sorted by length together
    for start in range(0, len(texts), window):
        encoded = _encoded(model, texts[start : start + window], bos)
        check_lengths(model, encoded)
        alike = list(
            batches(
                encoded,
                batch_size=batch_size,
                pad=pad_id(model),
                same_length=not can.pads,
                apart=can.apart,
            )
        )
        rng.shuffle(alike)  # or the longest texts would come first
        for batch in alike:
            there, kept = batch.to(device), Keep()
            run_until(model, there.tokens, there.padding, [(name, kept)], name)
            wanted = batch.mask & (batch.mask.cumsum(dim=1) > skip)
            yield kept.take()[wanted.to(device)]


def _encoded(model: Any, texts: Sequence[str | AnyEpisode], bos: bool | None) -> list[Any]:
    prompts = [text if isinstance(text, str) else text.prompt for text in texts]
    asked = [bos if isinstance(text, str) else text.template.bos for text in texts]
    if None in asked and isinstance(prompts[0], str):
        habit = bos_habit(model)
        asked = [habit if one is None else one for one in asked]
    found: list[Any] = [None] * len(texts)
    for one in set(asked):
        rows = [row for row, own in enumerate(asked) if own is one]
        some = encode(model, [prompts[row] for row in rows], bos=bool(one))
        for row, ids in zip(rows, some, strict=True):
            found[row] = ids
    return found
