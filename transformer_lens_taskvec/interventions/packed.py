"""The packed engine: many interventions on the same prompts in one forward pass.

Interventions on the last prompt token share everything before it. So the prompt without its last
token runs once, and its KV cache is kept. Then one suffix runs in which every variant is a
*branch*: the last prompt token and the answer's tokens, at the positions they would have alone,
under a 4-D mask that lets a branch see only the prompt and its own past. A hook acts on the first
token of its own branch. The work falls from ``variants x (prompt + answer)`` tokens to ``prompt +
variants x answer``. Before the first layer in which a branch is edited, it equals the unedited one:
if the model allows it, blocks run only on the branches that differ by then.

Where a model or an intervention rules this out, variants run one at a time on whole sequences, with
the same results.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_taskvec._utils.metrics import Answered
from transformer_lens_taskvec.activations import Reader, read_prompts
from transformer_lens_taskvec.interventions.intervention import Intervention
from transformer_lens_taskvec.models.capabilities import Capabilities, capabilities
from transformer_lens_taskvec.models.carried import warn_of_hooks
from transformer_lens_taskvec.models.forward import (
    branch_mask,
    branch_positions,
    mask_dtype,
    rows_of_cache,
    run_branches,
    run_prefix,
    run_prompts,
)
from transformer_lens_taskvec.models.limits import check_lengths
from transformer_lens_taskvec.models.protocol import device_of, hook_name, model_name
from transformer_lens_taskvec.models.tokens import Batch, batches, pad_id, row_indices

Hook = Intervention | tuple[str, Callable[..., Any]]
"""An intervention, or any pair of a hook name and a hook function."""

Variant = Sequence[Hook]
"""Interventions applied together, in order; the empty variant is the unedited model."""

_BRANCH_TOKENS = 256
"""The most suffix tokens per prompt: attention among them grows with their square."""

_VECTORS = 1 << 15
"""Vectors per pass of a model of the lab."""

_FEW = 4
"""Up to this number of variants, large batches save more than answers of one length."""


@dataclass(frozen=True)
class Chunk(Answered):
    """Answers of some prompts under some variants.

    Attributes:
        rows: The prompts' indices.
        variants: The variants' indices.
        observed: ``[row, layer, ...]`` of the unedited pass at the last prompt token, in one chunk
            per prompt and None in the others.
    """

    rows: tuple[int, ...]
    variants: tuple[int, ...]
    observed: Float[Tensor, "row layer ..."] | None = None


@dataclass(frozen=True)
class NumberChunk:
    """Predictions of a model of the lab after some prompts of vectors, ``[row, variant]``.

    The other attributes are those of :class:`Chunk`.
    """

    predictions: Float[Tensor, "row variant"]
    rows: tuple[int, ...]
    variants: tuple[int, ...]
    observed: Float[Tensor, "row layer ..."] | None


def answer_logits(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    variants: Sequence[Variant],
    *,
    observe: Sequence[str] = (),
    max_tokens: int | None = None,
) -> Iterator[Chunk]:
    """Yield teacher-forced logits of every prompt's answer under every variant.

    Run it inside :func:`~transformer_lens_taskvec.models.protocol.inference`.

    Args:
        model: Any model with TransformerLens' hook API.
        prompts: Token ids of each prompt.
        answers: Token ids of each prompt's answer.
        variants: The interventions of each variant.
        observe: Full names of hook points to read at the last prompt token of the unedited pass.
        max_tokens: The most tokens per pass, which limits memory; by default from the model's size
            and the free memory.

    Yields:
        Chunks that together cover every prompt and variant once.
    """
    check_lengths(model, prompts, answers)
    can = capabilities(model)
    packs = [index for index, variant in enumerate(variants) if all(map(_packs, variant))]
    if can.hooked:
        warn_of_hooks(model, stacklevel=4)
    elif len(packs) > 1 and not can.packs:
        _warn_plain(model, can.reason)
    budget = max_tokens or default_max_tokens(model)
    device = device_of(model)
    longest = max(map(len, prompts)) + max(map(len, answers))
    size = max(1, budget // longest)
    together, apart = _portions(prompts, answers, can)
    if apart and not can.hooked:
        _warn_plain(model, f"some prompts, with their answers, are longer than {can.why_apart}")
    for rows in [together, *apart]:
        packed = packs if can.packs and rows is together else []
        plain = sorted(set(range(len(variants))) - set(packed))
        for batch in batches(
            [prompts[row] for row in rows],
            # A prefix pass makes no logits, so more tokens fit.
            batch_size=4 * size if packed else size,
            pad=pad_id(model),
            same_length=not can.pads,
        ):
            batch = replace(batch.to(device), rows=tuple(rows[row] for row in batch.rows))
            ids, mask = _pad_right([answers[row] for row in batch.rows], device)
            alone = plain
            room = None if can.indexed is None else can.indexed - batch.tokens.shape[1] + 1
            if packed and (room is None or room >= 2 * ids.shape[1]):
                yield from _packed(
                    model, batch, ids, mask, variants, packed, budget, room, observe, can
                )
            else:
                alone = list(range(len(variants)))
            to_read = observe if set(packed) <= set(alone) else ()
            for start in range(0, len(batch.rows) if alone else 0, size):
                some, end = batch.part(start, start + size), start + size
                of_answers = ids[start:end], mask[start:end]
                yield from _one_by_one(
                    model, some, *of_answers, variants, alone, to_read, steps=can.hooked
                )


def answer_numbers(
    model: Any,
    prompts: Sequence[Float[Tensor, "pos dim"]],
    variants: Sequence[Variant],
    *,
    observe: Sequence[str] = (),
    max_tokens: int | None = None,
) -> Iterator[NumberChunk]:
    """Yield the numbers that a model of the lab predicts after each prompt of vectors.

    Args:
        model: A model that reads vectors and predicts one number per pair.
        prompts: The prompts; the last vector of each is its query.
        variants: As for :func:`answer_logits`.
        observe: As for :func:`answer_logits`.
        max_tokens: The most vectors per pass.

    Yields:
        Chunks that together cover every prompt once.
    """
    device = device_of(model)
    size = max(1, (max_tokens or _VECTORS) // max(map(len, prompts)))
    for batch in batches(prompts, batch_size=size, pad=0, same_length=True):
        batch = batch.to(device)
        predicted = [
            model.run_with_hooks(batch.tokens, fwd_hooks=prompt_hooks(variant, batch.mask))
            for variant in variants
        ]
        last = torch.stack([numbers[:, -1].float().cpu() for numbers in predicted], dim=1)
        observed = read_prompts(model, batch, observe) if observe else None
        yield NumberChunk(last, batch.rows, tuple(range(len(variants))), observed)


def prompt_hooks(
    hooks: Variant, prompt_mask: Bool[Tensor, "row pos"]
) -> list[tuple[str, Callable[..., Any]]]:
    """Return hooks that act at the interventions' positions of prompts that tokens may follow.

    Args:
        hooks: Interventions, or pairs of a hook name and a hook function, which are not changed.
        prompt_mask: ``[row, pos]`` of the prompts alone.
    """
    return [
        (hook.name, _at_prompt(hook, prompt_mask)) if isinstance(hook, Intervention) else hook
        for hook in hooks
    ]


def default_max_tokens(model: Any) -> int:
    """Return how many tokens per pass use a modest part of the free memory."""
    cfg = model.cfg
    width = int(getattr(cfg, "d_mlp", None) or 4 * int(cfg.d_model))
    heads = int(getattr(cfg, "n_heads", None) or 1)
    per_token = 4 * (3 * int(cfg.d_vocab) + 8 * width + 4 * heads * 2 * _BRANCH_TOKENS)
    device = device_of(model)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(min(max(free // 4 // per_token, 256), 65536))
    return int(min(max((1 << 30) // per_token, 256), 1024))


def _packs(hook: Hook) -> bool:
    return isinstance(hook, Intervention) and hook.position in (-1, (-1,))


def _portions(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], can: Capabilities
) -> tuple[list[int], list[list[int]]]:
    """Return the rows that may share padded batches, and groups of rows of one length each."""
    longest = max(map(len, answers))
    together: list[int] = []
    apart: dict[tuple[int, int], list[int]] = {}
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        # Nothing is read after an answer's last token.
        if can.hooked or (can.apart is not None and len(prompt) + longest - 1 > can.apart):
            apart.setdefault((len(prompt), len(answer)), []).append(row)
        else:
            together.append(row)
    return together, list(apart.values())


def _warn_plain(model: Any, reason: str) -> None:
    warnings.warn(
        f"{model_name(model)} runs one intervention at a time: {reason}. Results are the same, "
        "only slower.",
        stacklevel=5,
    )


def _pad_right(
    answers: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "row answer_pos"], Bool[Tensor, "row answer_pos"]]:
    longest = max(map(len, answers))
    ids = torch.zeros(len(answers), longest, dtype=torch.long)
    mask = torch.zeros(len(answers), longest, dtype=torch.bool)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = torch.tensor(answer)
        mask[row, : len(answer)] = True
    return ids.to(device), mask.to(device)


def _packed(
    model: Any,
    batch: Batch,
    ids: Int[Tensor, "row answer_pos"],
    mask: Bool[Tensor, "row answer_pos"],
    variants: Sequence[Variant],
    chosen: Sequence[int],
    budget: int,
    room: int | None,
    observe: Sequence[str],
    can: Capabilities,
) -> Iterator[Chunk]:
    """Run the prompts once, then the chosen variants of prompts with similar answers."""
    cache = run_prefix(model, batch.tokens[:, :-1], batch.mask[:, :-1])
    shares = can.shares_layers
    moved = {i: _early(model, variants[i]) if shares else variants[i] for i in chosen}
    plain = tuple(index for index in chosen if not moved[index])
    edited = sorted((i for i in chosen if moved[i]), key=lambda index: _first(moved[index]))
    for group in _alike(mask, len(chosen)):
        length = int(mask[group].sum(dim=1).max())
        tokens = min(_BRANCH_TOKENS, budget, budget if room is None else room)
        branches = max(1, tokens // length - 1)
        suffix = (1 + min(branches, len(edited))) * length
        size = max(1, budget // suffix)
        for rows in group.split(size):
            kept = rows_of_cache(cache, rows)
            prefix = batch.mask[rows, :-1]
            answers, real = ids[rows, :length], mask[rows, :length]
            branch = torch.cat([batch.tokens[rows, -1:], answers[:, :-1]], dim=1)
            numbers = tuple(batch.rows[row] for row in rows.tolist())
            for start in range(0, max(len(edited), 1), branches):
                some = tuple(edited[start : start + branches])
                edits = [moved[index] for index in some]
                reader = Reader(observe if start == 0 else (), 0)
                logits = _suffix(model, branch, prefix, kept, edits, reader, shares)
                if bool(logits[..., 0].isnan().any()):
                    # A masked key weighs 0, and 0 times infinity in one branch is NaN in all.
                    _warn_plain(model, "an intervention makes activations infinite or NaN")
                    again = [*(plain if start == 0 else ()), *some]
                    for row in rows.tolist():
                        one, end = batch.part(row, row + 1), row + 1
                        of_answer = ids[row:end, :length], mask[row:end, :length]
                        to_read = observe if start == 0 else ()
                        yield from _one_by_one(model, one, *of_answer, variants, again, to_read)
                    continue
                if start == 0 and (plain or observe):
                    unedited = repeat(
                        logits[:, 0], "row pos vocab -> row variant pos vocab", variant=len(plain)
                    )
                    observed = reader.take() if observe else None
                    yield Chunk(unedited, answers, real, numbers, plain, observed)
                if some:
                    yield Chunk(logits[:, 1:], answers, real, numbers, some)


def _suffix(
    model: Any,
    branch: Int[Tensor, "row answer_pos"],
    prefix: Bool[Tensor, "row pos"],
    cache: Any,
    variants: Sequence[Variant],
    reader: Reader,
    shares: bool,
) -> Float[Tensor, "row branch answer_pos vocab"]:
    """Return the logits of the unedited branch and of one branch per variant, by first edit."""
    length = branch.shape[1]
    n_branches = 1 + len(variants)
    first = [_first(variant) for variant in variants]
    active = [1 + bisect_right(first, layer) for layer in range(int(model.cfg.n_layers))]
    bias = branch_mask(prefix, n_branches=n_branches, branch_length=length, dtype=mask_dtype(model))
    logits = run_branches(
        model,
        repeat(branch, "row pos -> row (branch pos)", branch=n_branches),
        bias,
        branch_positions(prefix, n_branches=n_branches, branch_length=length),
        cache,
        [*reader.hooks, *_branch_hooks(model, [(), *variants], length)],
        active=active if shares else None,
    )
    return rearrange(logits, "row (branch pos) vocab -> row branch pos vocab", branch=n_branches)


def _alike(mask: Bool[Tensor, "row answer_pos"], n_variants: int) -> list[Int[Tensor, " some"]]:
    """Return the rows to run together: with many variants, those with answers of one length.

    Otherwise every variant would run the padding of shorter answers.
    """
    lengths = mask.sum(dim=1)
    if n_variants <= _FEW:
        return [torch.arange(len(lengths), device=mask.device)]
    return [torch.where(lengths == length)[0] for length in lengths.unique()]


def _early(model: Any, variant: Variant) -> Variant:
    """Return the variant with edits after a block moved before the next, to share the block.

    They stay ahead of the edits that are already there.
    """
    points, n_layers = model.hook_dict, int(model.cfg.n_layers)
    moved: list[Hook] = []
    rest: list[Hook] = []
    for hook in variant:
        assert isinstance(hook, Intervention)
        after = points[hook_name("resid_post", hook.layer)]
        if points[hook.name] is after and hook.layer + 1 < n_layers:
            moved.append(replace(hook, layer=hook.layer + 1, hook="resid_pre"))
        else:
            rest.append(hook)
    return [*moved, *rest]


def _first(variant: Variant) -> int:
    """Return the first layer that a variant edits."""
    return min(hook.layer for hook in variant if isinstance(hook, Intervention))


def _branch_hooks(
    model: Any, variants: Sequence[Variant], length: int
) -> list[tuple[str, Callable[..., Any]]]:
    """Return one hook function per edited hook point, which edits each branch's first token.

    Several names of one hook point count as one, so that a variant's edits keep their order.
    """
    points = model.hook_dict
    edits: dict[int, list[tuple[int, Intervention]]] = {}
    for index, variant in enumerate(variants):
        for hook in variant:
            assert isinstance(hook, Intervention)
            edits.setdefault(id(points[hook.name]), []).append((index * length, hook))
    return [(of_point[0][1].name, _in_branches(of_point)) for of_point in edits.values()]


def _in_branches(edits: Sequence[tuple[int, Intervention]]) -> Callable[..., Tensor]:
    def hook_function(activation: Tensor, hook: Any = None) -> Tensor:
        edited = activation.clone()
        for column, intervention in edits:
            edited[:, column] = intervention.edit(edited[:, column])
        return edited

    return hook_function


def _at_prompt(intervention: Intervention, prompt_mask: Tensor) -> Callable[..., Tensor]:
    def hook_function(activation: Tensor, hook: Any = None) -> Tensor:
        if intervention.position is None:
            return intervention(activation)
        return intervention.edit_at(activation, row_indices(intervention.position, prompt_mask))

    return hook_function


def _one_by_one(
    model: Any,
    batch: Batch,
    ids: Int[Tensor, "row answer_pos"],
    mask: Bool[Tensor, "row answer_pos"],
    variants: Sequence[Variant],
    chosen: Sequence[int],
    observe: Sequence[str],
    *,
    steps: bool = False,
) -> Iterator[Chunk]:
    """Run whole sequences, once per chosen variant.

    With ``steps`` every token of the answers has a pass of its own, in which it comes next: what
    hooks that edit the last position expect. Answers then have one length.
    """
    unedited = next((index for index in chosen if not variants[index]), None)
    observed = None
    if observe and unedited is None:
        observed = read_prompts(model, batch, observe)
    width, length = batch.tokens.shape[1], ids.shape[1]
    tokens = torch.cat([batch.tokens, ids[:, :-1]], dim=1)
    # The padding after short answers counts as real: no token before sees it.
    whole = torch.cat([batch.mask, torch.ones_like(ids[:, :-1], dtype=torch.bool)], dim=1)
    for index in chosen:
        reader = Reader(observe if index == unedited else (), width - 1)
        hooks = [*reader.hooks, *prompt_hooks(variants[index], batch.mask)]
        ends = range(width, width + length) if steps else [width + length - 1]
        passes = []
        for end in ends:
            logits = run_prompts(model, tokens[:, :end], whole[:, :end], hooks)
            passes.append(logits[:, -1:] if steps else logits[:, width - 1 :])
            if observe and index == unedited and end == ends[0]:
                observed = reader.take()
        answered = torch.cat(passes, dim=1)
        answered = rearrange(answered, "row pos vocab -> row 1 pos vocab")
        yield Chunk(answered, ids, mask, batch.rows, (index,), observed)
        observed = None
