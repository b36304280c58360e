"""The packed engine: many interventions on many prompts in few forward passes.

Interventions on the last prompt token share everything before it. So the prompt without its last
token runs once, what several prompts begin with even once for all of them, and the keys and values
are kept. Then one suffix runs in which every variant is a *branch*: the last prompt token and the
answer's tokens, at the positions they would have alone, under a 4-D mask that lets a branch see
only the prompt and its own past. A hook acts on the first token of its own branch. The work falls
from ``variants x (prompt + answer)`` tokens to ``prompt + variants x answer``. Before the first
layer in which a branch is edited, it equals the unedited one: if the model allows it, blocks run
only on the branches that differ by then.

Where a model or an intervention rules this out, variants run one at a time on whole sequences, with
the same results.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_taskvec._utils.metrics import Answered
from transformer_lens_taskvec.activations import Reader, read_prompts
from transformer_lens_taskvec.interventions.branches import branch_hooks
from transformer_lens_taskvec.interventions.intervention import Intervention, altered
from transformer_lens_taskvec.models.capabilities import Capabilities, capabilities
from transformer_lens_taskvec.models.carried import warn_of_hooks
from transformer_lens_taskvec.models.forward import (
    run_branches,
    run_prefix,
    run_prompts,
    run_until,
)
from transformer_lens_taskvec.models.limits import check_lengths
from transformer_lens_taskvec.models.past import Past
from transformer_lens_taskvec.models.prefixes import Step, fewest_saved, in_steps, steps
from transformer_lens_taskvec.models.protocol import device_of, hook_name, model_name
from transformer_lens_taskvec.models.readout import ENTERS, Keep
from transformer_lens_taskvec.models.tokens import Batch, batches, pad_id

Hook = Intervention | tuple[str, Callable[..., Any]]
"""An intervention, or any pair of a hook name and a hook function."""

Variant = Sequence[Hook]
"""Interventions applied together, in order; the empty variant is the unedited model."""

_BRANCH_TOKENS = 256
"""The most suffix tokens per prompt: attention among them grows with their square."""

_LOGITS = 1 << 24
"""The most logits that are made at a time, where that is up to the library."""

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
    every = range(len(variants))
    packable = [index for index in every if all(map(acts_at_end, variants[index]))]
    if can.hooked:
        warn_of_hooks(model, stacklevel=4)
    elif not can.packs and len(packable) > 1:
        _warn_plain(model, can.reason)
    together, apart = _portions(prompts, answers, can)
    if apart and not can.hooked:
        _warn_plain(model, f"some prompts, with their answers, are longer than {can.why_apart}")
    device = device_of(model)
    there = [[placed(hook, device) for hook in variant] for variant in variants]
    budget = max_tokens or default_max_tokens(model)
    work = _Work(model, can, prompts, answers, there, observe, budget)
    packed = packable if can.packs and together else []
    if packed:
        for batch, past in in_steps(model, work.plan(together)):
            rows = tuple(together[row] for row in batch.rows)
            yield from _packed(work, replace(batch, rows=rows), past, packed)
    alone = [index for index in every if index not in packed]
    yield from _plainly(work, together, alone, () if packed else observe)
    for group in apart:
        yield from _plainly(work, group, every, observe)


@dataclass(frozen=True)
class _Work:
    """What :func:`answer_logits` was asked for."""

    model: Any
    can: Capabilities
    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    variants: Sequence[Variant]
    observe: Sequence[str]
    budget: int

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and an answer."""
        return max(map(len, self.prompts)) + max(map(len, self.answers))

    def plan(self, rows: Sequence[int]) -> list[Step]:
        """Return the steps in which some prompts run before they branch."""
        prompts = [self.prompts[row] for row in rows]
        # A pass that makes no logits takes more tokens.
        budget = 4 * max(self.budget, self.longest)
        return steps(prompts, budget=budget, can=self.can, fewest=fewest_saved(self.model))

    def answers_of(
        self, rows: Sequence[int]
    ) -> tuple[Int[Tensor, "row answer_pos"], Bool[Tensor, "row answer_pos"]]:
        """Return the right-padded answers of some prompts, and where they are real."""
        return _pad_right([self.answers[row] for row in rows], device_of(self.model))

    def chunks(
        self,
        values: Float[Tensor, "row variant answer_pos d"],
        rows: tuple[int, ...],
        variants: tuple[int, ...],
        observed: Float[Tensor, "row layer ..."] | None = None,
    ) -> Iterator[Chunk]:
        """Yield the logits of some prompts and variants, of a few tokens at a time.

        Args:
            values: Logits, or what enters the unembedding if the model has a ``readout``.
            rows: The prompts.
            variants: The variants.
            observed: As for :class:`Chunk`.
        """
        ids, real = self.answers_of(rows)
        length = values.shape[2]
        ids, real = ids[:, :length], real[:, :length]
        readout = self.can.readout
        tokens = max(1, _LOGITS // int(self.model.cfg.d_vocab))
        if readout is None:
            tokens = values.shape[:3].numel()
        of_row = max(1, len(variants) * length)
        n_rows, n_variants = max(1, tokens // of_row), max(1, min(of_row, tokens) // length)
        for row in range(0, len(rows), n_rows):
            some = slice(row, row + n_rows)
            for first in range(0, max(1, len(variants)), n_variants):
                tile = values[some, first : first + n_variants]
                yield Chunk(
                    tile if readout is None else readout.logits(self.model, tile),
                    ids[some],
                    real[some],
                    rows[some],
                    variants[first : first + n_variants],
                    None if observed is None or first else observed[some],
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
            model.run_with_hooks(batch.tokens, fwd_hooks=prompt_hooks(variant, batch))
            for variant in variants
        ]
        last = torch.stack([numbers[:, -1].float() for numbers in predicted], dim=1)
        observed = read_prompts(model, batch, observe) if observe else None
        yield NumberChunk(last, batch.rows, tuple(range(len(variants))), observed)


def prompt_hooks(hooks: Variant, prompts: Batch) -> list[tuple[str, Callable[..., Any]]]:
    """Return hooks that act at the interventions' positions of prompts that tokens may follow.

    Args:
        hooks: Interventions, or pairs of a hook name and a hook function, which are not changed.
        prompts: The prompts alone.
    """
    return [
        (hook.name, _at_prompt(hook, prompts)) if isinstance(hook, Intervention) else hook
        for hook in hooks
    ]


def default_max_tokens(model: Any) -> int:
    """Return how many tokens per pass use a modest part of the free memory."""
    cfg = model.cfg
    width = int(getattr(cfg, "d_mlp", None) or 4 * int(cfg.d_model))
    heads = int(getattr(cfg, "n_heads", None) or 1)
    logits = 0 if capabilities(model).readout else 3 * int(cfg.d_vocab)
    per_token = 4 * (logits + 8 * width + 4 * heads * 2 * _BRANCH_TOKENS)
    device = device_of(model)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(min(max(free // 4 // per_token, 256), 65536))
    return int(min(max((1 << 30) // per_token, 256), 1024))


def acts_at_end(hook: Hook) -> bool:
    """Return whether a hook is an intervention that acts at the last prompt token only."""
    return isinstance(hook, Intervention) and hook.position in (-1, (-1,))


def placed(hook: Hook, device: torch.device) -> Hook:
    """Return an intervention with its vector on a device."""
    if not isinstance(hook, Intervention) or hook.vector is None or hook.vector.device == device:
        return hook
    return altered(hook, vector=hook.vector.to(device))


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


@dataclass(frozen=True)
class Suffix:
    """A pass over branches of some prompts.

    Attributes:
        rows: The prompts' indices in their batch.
        length: The tokens of a branch: the last prompt token, and the answer's but the last.
        start: The first of the edited variants that run.
        end: The end of these variants.
    """

    rows: tuple[int, ...]
    length: int
    start: int
    end: int


def suffixes(
    lengths: Sequence[int], n_edited: int, n_variants: int, *, budget: int, most: int | None
) -> list[Suffix]:
    """Return the passes over the branches of a batch of prompts.

    With many variants, prompts with answers of one length run together; otherwise every variant
    would run the padding of shorter answers.

    Args:
        lengths: The number of tokens of each prompt's answer.
        n_edited: The number of variants that edit something.
        n_variants: The number of all variants.
        budget: The most tokens of a pass.
        most: The most tokens of one prompt's branches, None for no limit.
    """
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(0 if n_variants <= _FEW else length, []).append(row)
    found: list[Suffix] = []
    for _, group in sorted(groups.items()):
        length = max(lengths[row] for row in group)
        tokens = min(one for one in (_BRANCH_TOKENS, budget, most) if one is not None)
        branches = max(1, tokens // length - 1)
        size = max(1, budget // ((1 + min(branches, n_edited)) * length))
        for first in range(0, len(group), size):
            rows = tuple(group[first : first + size])
            found.extend(
                Suffix(rows, length, start, min(start + branches, n_edited))
                for start in range(0, max(n_edited, 1), branches)
            )
    return found


def _packed(work: _Work, batch: Batch, past: Past | None, chosen: Sequence[int]) -> Iterator[Chunk]:
    """Run the prompts once, then the chosen variants of prompts with similar answers.

    Args:
        work: What was asked for.
        batch: The prompts, without what stands before.
        past: What stands before.
        chosen: The variants, all of which pack.
    """
    model, can = work.model, work.can
    moved = {index: work.variants[index] for index in chosen}
    if can.shares_layers:
        points = model.hook_dict  # made anew at every look
        moved = {index: _early(model, points, variant) for index, variant in moved.items()}
    unedited = tuple(index for index in chosen if not moved[index])
    edited = sorted((i for i in chosen if moved[i]), key=lambda index: _first(moved[index]))
    lengths = [len(work.answers[row]) for row in batch.rows]
    width = batch.tokens.shape[1] + (past.width if past else 0)
    room = None if can.indexed is None else can.indexed - width + 1
    if room is not None and room < 2 * max(lengths):
        yield from _plainly(work, batch.rows, chosen, work.observe)
        return
    if not edited and can.readout is not None:
        yield from _unedited(work, batch, past, unedited)
        return
    before = run_prefix(model, batch.before_last(), past)
    for suffix in suffixes(lengths, len(edited), len(chosen), budget=work.budget, most=room):
        some = tuple(edited[suffix.start : suffix.end])
        numbers = tuple(batch.rows[row] for row in suffix.rows)
        rows = torch.tensor(suffix.rows, device=batch.tokens.device)
        ids, _ = work.answers_of(numbers)
        branch = torch.cat([batch.tokens[rows, -1:], ids[:, :-1]], dim=1)
        first = suffix.start == 0
        reader = Reader(work.observe if first else (), 0)
        edits = [moved[index] for index in some]
        values = _branches(work, branch, before.rows(rows), edits, reader)
        if bool(values[..., 0].isnan().any()):
            # A masked key weighs 0, and 0 times infinity in one branch is NaN in all.
            _warn_plain(model, "an intervention makes activations infinite or NaN")
            again = [*(unedited if first else ()), *some]
            yield from _plainly(work, numbers, again, work.observe if first else ())
            continue
        if first and (unedited or work.observe):
            alike = values[:, :1].expand(-1, len(unedited), -1, -1)
            yield from work.chunks(alike, numbers, unedited, reader.take())
        if some:
            yield from work.chunks(values[:, 1:], numbers, some)


def _unedited(
    work: _Work, batch: Batch, past: Past | None, variants: tuple[int, ...]
) -> Iterator[Chunk]:
    """Run prompts and answers in one pass."""
    ids, _ = work.answers_of(batch.rows)
    width, length = batch.tokens.shape[1], ids.shape[1]
    tokens, padding = _with_answers(batch, ids)
    reader, entering = Reader(work.observe, width - 1), Keep(lambda hidden: hidden[:, width - 1 :])
    hooks: list[tuple[str, Callable[..., Any]]] = [*reader.hooks, (ENTERS, entering)]
    run_until(work.model, tokens, padding, hooks, ENTERS, past=past)
    hidden = rearrange(entering.take(), "row pos d -> row 1 pos d")
    alike = hidden.expand(-1, len(variants), length, -1)
    yield from work.chunks(alike, batch.rows, variants, reader.take())


def _branches(
    work: _Work,
    branch: Int[Tensor, "row answer_pos"],
    past: Past,
    variants: Sequence[Variant],
    reader: Reader,
) -> Float[Tensor, "row branch answer_pos d"]:
    """Return the logits, or what enters the unembedding, of the unedited branch and the others.

    There is one per variant, in the order of their first edits.
    """
    model, can = work.model, work.can
    length, n_branches = branch.shape[1], 1 + len(variants)
    first = [_first(variant) for variant in variants]
    active = [1 + bisect_right(first, layer) for layer in range(int(model.cfg.n_layers))]
    values = run_branches(
        model,
        repeat(branch, "row pos -> row (branch pos)", branch=n_branches),
        past,
        [*reader.hooks, *branch_hooks(model, [(), *variants], length)],
        n_branches=n_branches,
        active=active if can.shares_layers else None,
        reads_out=can.readout is None,
    )
    return rearrange(values, "row (branch pos) d -> row branch pos d", branch=n_branches)


def _early(model: Any, points: Mapping[str, Any], variant: Variant) -> Variant:
    """Return the variant with edits after a block moved before the next, to share the block.

    They stay ahead of the edits that are already there.
    """
    n_layers = int(model.cfg.n_layers)
    moved: list[Hook] = []
    rest: list[Hook] = []
    for hook in variant:
        assert isinstance(hook, Intervention)
        after = points[hook_name("resid_post", hook.layer)]
        if points[hook.name] is after and hook.layer + 1 < n_layers:
            moved.append(altered(hook, layer=hook.layer + 1, hook="resid_pre"))
        else:
            rest.append(hook)
    return [*moved, *rest]


def _first(variant: Variant) -> int:
    """Return the first layer that a variant edits."""
    return min(hook.layer for hook in variant if isinstance(hook, Intervention))


def _at_prompt(intervention: Intervention, prompts: Batch) -> Callable[..., Tensor]:
    everywhere = intervention.position is None
    columns = None if everywhere else prompts.columns(intervention.position)

    def hook_function(activation: Tensor, hook: Any = None) -> Tensor:
        if columns is None:
            return intervention(activation)
        return intervention.edit_at(activation, columns)

    return hook_function


def _with_answers(
    batch: Batch, ids: Int[Tensor, "row answer_pos"]
) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"] | None]:
    """Return prompts with their answers but the last token, and where these are real.

    The padding after short answers counts as real: no token before sees it.
    """
    tokens = torch.cat([batch.tokens, ids[:, :-1]], dim=1)
    if batch.padding is None:
        return tokens, None
    return tokens, torch.cat([batch.mask, torch.ones_like(ids[:, :-1], dtype=torch.bool)], dim=1)


def _plainly(
    work: _Work, rows: Sequence[int], chosen: Sequence[int], observe: Sequence[str]
) -> Iterator[Chunk]:
    """Run whole sequences, once per chosen variant.

    Under hooks of the user's every token of the answers has a pass of its own, in which it comes
    next: what hooks that edit the last position expect. Answers then have one length.
    """
    if not rows or not chosen:
        return
    model, can = work.model, work.can
    unedited = next((index for index in chosen if not work.variants[index]), None)
    for batch in batches(
        [work.prompts[row] for row in rows],
        batch_size=max(1, work.budget // work.longest),
        pad=pad_id(model),
        same_length=not can.pads,
        apart=can.apart,
    ):
        batch = replace(batch, rows=tuple(rows[row] for row in batch.rows)).to(device_of(model))
        ids, real = work.answers_of(batch.rows)
        observed = None
        if observe and unedited is None:
            observed = read_prompts(model, batch, observe)
        width, length = batch.tokens.shape[1], ids.shape[1]
        tokens, padding = _with_answers(batch, ids)
        ends = range(width, width + length) if can.hooked else [width + length - 1]
        for index in chosen:
            reader = Reader(observe if index == unedited else (), width - 1)
            hooks = [*reader.hooks, *prompt_hooks(work.variants[index], batch)]
            passes = []
            for end in ends:
                until = None if padding is None else padding[:, :end]
                logits = run_prompts(model, tokens[:, :end], until, hooks)
                passes.append(logits[:, -1:] if can.hooked else logits[:, width - 1 :])
                if observe and index == unedited and end == ends[0]:
                    observed = reader.take()
            answered = rearrange(torch.cat(passes, dim=1), "row pos vocab -> row 1 pos vocab")
            yield Chunk(answered, ids, real, batch.rows, (index,), observed)
            observed = None
