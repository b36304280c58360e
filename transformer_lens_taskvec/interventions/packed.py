"""The packed engine: many interventions on many prompts in few forward passes.

Interventions on the last prompt token share everything before it. So the prompt without its last
token runs once, what several prompts begin with even once for all of them, and the keys and values
are kept. Then one suffix runs in which every variant is a *branch*: the last prompt token and the
answer's tokens, at the positions they would have alone, under a 4-D mask that lets a branch see
only the prompt and its own past. A hook acts on the first token of its own branch. The work falls
from ``variants x (prompt + answer)`` tokens to ``prompt + variants x answer``. Before the first
layer in which a branch is edited, it equals the unedited one: if the model allows it, blocks run
only on the branches that differ by then.

Interventions at several of the last tokens, such as separators of demonstrations, branch before the
first of these.

Where a model or an intervention rules this out, variants run one at a time on whole sequences, with
the same results.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from transformer_lens_taskvec._utils.metrics import Answered
from transformer_lens_taskvec.activations import Reader, read_prompts
from transformer_lens_taskvec.interventions.branches import (
    BRANCH_TOKENS,
    branch_hooks,
    suffixes,
)
from transformer_lens_taskvec.interventions.intervention import Intervention
from transformer_lens_taskvec.interventions.variants import (
    Branching,
    PromptHook,
    Variant,
    acts_at_end,
    branching,
    placed,
    tail,
)
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
from transformer_lens_taskvec.models.protocol import device_of, model_name
from transformer_lens_taskvec.models.readout import ENTERS, Keep
from transformer_lens_taskvec.models.tokens import (
    Each,
    Position,
    PromptBatch,
    batches,
    pad_id,
    right_padded,
)

_LOGITS = 1 << 24
"""The most logits that are made at a time, where that is up to the library."""

_TAIL = BRANCH_TOKENS // 4
"""The most tokens of a prompt that a branch begins with: of longer ones too few fit in a pass."""

_VECTORS = 1 << 15
"""Vectors per pass of a model of the lab."""


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
    """Predictions of a model of the lab after some prompts.

    ``predictions`` are ``[row, variant]``, or ``[row, variant, output]`` if an output is of several
    numbers; the other attributes are those of :class:`Chunk`.
    """

    predictions: Float[Tensor, "row variant *output"]
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
    at_end: list[int] = []
    before: list[int] = []
    for index in every:
        if all(map(acts_at_end, variants[index])):
            at_end.append(index)
        elif tail([variants[index]], 0) is not None:
            before.append(index)
    packable = sorted([*at_end, *before])
    if can.hooked:
        warn_of_hooks(model, stacklevel=4)
    elif not can.packs and len(packable) > 1:
        _warn_plain(model, can.reason)
    together, apart = _portions(prompts, answers, can)
    if apart and not can.hooked:
        _warn_plain(model, f"some prompts, with their answers, are longer than {can.why_apart}")
    device = device_of(model)
    there = [[placed(hook, device) for hook in variant] for variant in variants]
    budget = max_tokens or default_max_tokens(model, can)
    work = _Work(model, can, prompts, answers, there, observe, budget)
    packed = packable if can.packs and together else []
    for some in (at_end, before) if packed else ():
        if not some:
            continue
        branches = branching(model, there, some, shares_layers=can.shares_layers)
        seen = () if some is before and at_end else observe
        parts = [(1, together)] if some is at_end else _tails(work, together, some)
        for length, rows in parts:
            if length > _TAIL:
                yield from _plainly(work, rows, some, seen)
                continue
            part = replace(work, tail=length, observe=seen)
            for batch, past in in_steps(model, part.plan(rows)):
                numbers = tuple(rows[row] for row in batch.rows)
                yield from _packed(part, replace(batch, rows=numbers), past, branches)
    alone = [index for index in every if index not in packed]
    yield from _plainly(work, together, alone, () if packed else observe)
    for group in apart:
        yield from _plainly(work, group, every, observe)


@dataclass(frozen=True)
class _Work:
    """What :func:`answer_logits` was asked for.

    A branch begins with the last ``tail`` tokens of its prompt.
    """

    model: Any
    can: Capabilities
    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    variants: Sequence[Variant]
    observe: Sequence[str]
    budget: int
    tail: int = 1

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and an answer."""
        return max(map(len, self.prompts)) + max(map(len, self.answers))

    def plan(self, rows: Sequence[int]) -> list[Step]:
        """Return the steps in which some prompts run before they branch."""
        prompts = [self.prompts[row][: len(self.prompts[row]) - self.tail + 1] for row in rows]
        # A pass that makes no logits takes more tokens.
        budget = 4 * max(self.budget, self.longest)
        return steps(prompts, budget=budget, can=self.can, fewest=fewest_saved(self.model))

    def answers_of(
        self, rows: Sequence[int]
    ) -> tuple[Int[Tensor, "row answer_pos"], Bool[Tensor, "row answer_pos"]]:
        """Return the right-padded answers of some prompts, and where they are real."""
        return right_padded([self.answers[row] for row in rows], device_of(self.model))

    def tails(self, rows: Sequence[int]) -> Int[Tensor, "row after"]:
        """Return the tokens of prompts after the first token of a branch."""
        after = [self.prompts[row][len(self.prompts[row]) - self.tail + 1 :] for row in rows]
        return torch.tensor(after, dtype=torch.long, device=device_of(self.model))

    def chunks(
        self,
        values: Float[Tensor, "row variant answer_pos d"],
        ids: Int[Tensor, "row answer_pos"],
        real: Bool[Tensor, "row answer_pos"],
        rows: tuple[int, ...],
        variants: tuple[int, ...],
        observed: Float[Tensor, "row layer ..."] | None = None,
    ) -> Iterator[Chunk]:
        """Yield the logits of some prompts and variants, of a few tokens at a time.

        Args:
            values: Logits, or what enters the unembedding if the model has a ``readout``.
            ids: The answers, from :meth:`answers_of`.
            real: Where they are real.
            rows: The prompts.
            variants: The variants.
            observed: As for :class:`Chunk`.
        """
        readout, length = self.can.readout, values.shape[2]
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
    prompts: Sequence[Shaped[Tensor, "pos ..."]],
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


def prompt_hooks(hooks: Variant, prompts: PromptBatch) -> list[tuple[str, Callable[..., Any]]]:
    """Return hooks that act at the interventions' positions of prompts that tokens may follow.

    Args:
        hooks: Interventions, or pairs of a hook name and a hook function, which are not changed.
        prompts: The prompts alone.
    """
    found: list[tuple[str, Callable[..., Any]]] = []
    for hook in hooks:
        if isinstance(hook, PromptHook):
            found.append((hook.name, hook.of(prompts)))
        elif isinstance(hook, Intervention):
            found.append((hook.name, _at_prompt(hook, prompts)))
        else:
            found.append(hook)
    return found


def default_max_tokens(model: Any, can: Capabilities) -> int:
    """Return how many tokens per pass use a modest part of the free memory."""
    cfg = model.cfg
    width = int(getattr(cfg, "d_mlp", None) or 4 * int(cfg.d_model))
    heads = int(getattr(cfg, "n_heads", None) or 1)
    logits = 0 if can.readout else 3 * int(cfg.d_vocab)
    per_token = 4 * (logits + 8 * width + 4 * heads * 2 * BRANCH_TOKENS)
    device = device_of(model)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(min(max(free // 4 // per_token, 256), 65536))
    return int(min(max((1 << 30) // per_token, 256), 1024))


def _in_tail(position: Position, rows: Sequence[int], end: int) -> Int[Tensor, "row at"]:
    """Return the columns of prompts' positions in branches whose prompts end before ``end``."""
    if isinstance(position, Each):
        return torch.tensor([[end + position.from_end[row]] for row in rows])
    places = (position,) if isinstance(position, int) else position
    assert isinstance(places, tuple)
    return repeat(end + torch.tensor(places), "at -> row at", row=len(rows))


def _tails(
    work: _Work, rows: Sequence[int], variants: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    """Yield with which number of its last tokens a prompt branches, and the prompts."""
    some = [work.variants[index] for index in variants]
    needed = {row: tail(some, row) or 1 for row in rows}
    for row, own in needed.items():
        if own > len(work.prompts[row]):
            raise ValueError(
                f"position {-own} is outside a prompt of {len(work.prompts[row])} token(s)"
            )
    while needed:
        length = max(needed.values())
        found = [row for row in needed if len(work.prompts[row]) >= length]
        yield length, found
        needed = {row: own for row, own in needed.items() if row not in set(found)}


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


def _packed(
    work: _Work, batch: PromptBatch, past: Past | None, branches: Branching
) -> Iterator[Chunk]:
    """Run the prompts once, then the variants of prompts with similar answers.

    Args:
        work: What was asked for.
        batch: The prompts, without what stands before.
        past: What stands before.
        branches: The variants.
    """
    model, can = work.model, work.can
    unedited, edited = branches.unedited, branches.edited
    after = work.tail - 1  # tokens of the prompt after the first of a branch
    lengths = [after + len(work.answers[row]) for row in batch.rows]
    width = batch.tokens.shape[1] + (past.width if past else 0)
    room = None if can.indexed is None else can.indexed - width + 1
    if room is not None and room < 2 * max(lengths):
        yield from _plainly(work, batch.rows, sorted([*unedited, *edited]), work.observe)
        return
    if not edited and can.readout is not None:
        yield from _unedited(work, batch, past, unedited)
        return
    before = run_prefix(model, batch.before_last(), past)
    n_variants = len(unedited) + len(edited)
    for suffix in suffixes(lengths, len(edited), n_variants, budget=work.budget, most=room):
        some = edited[suffix.start : suffix.end]
        edits = [(), *branches.edits[suffix.start : suffix.end]]
        numbers = tuple(batch.rows[row] for row in suffix.rows)
        rows = torch.tensor(suffix.rows, device=batch.tokens.device)
        ids, real = work.answers_of(numbers)
        branch = torch.cat([batch.tokens[rows, -1:], work.tails(numbers), ids[:, :-1]], dim=1)
        columns = partial(_in_tail, rows=numbers, end=work.tail) if after else None
        first = suffix.start == 0
        reader = Reader(work.observe if first else (), after)
        active = branches.active(suffix.start, suffix.end, int(model.cfg.n_layers))
        values = run_branches(
            model,
            repeat(branch, "row pos -> row (branch pos)", branch=len(edits)),
            before.rows(rows),
            [*reader.hooks, *branch_hooks(model, edits, branch.shape[1], columns)],
            n_branches=len(edits),
            active=active if can.shares_layers else None,
            reads_out=can.readout is None,
        )
        values = rearrange(values, "row (branch pos) d -> row branch pos d", branch=len(edits))
        values = values[:, :, after:]
        if bool(values[..., 0].isnan().any()):
            # A masked key weighs 0, and 0 times infinity in one branch is NaN in all.
            _warn_plain(model, "an intervention makes activations infinite or NaN")
            again = [*(unedited if first else ()), *some]
            yield from _plainly(work, numbers, again, work.observe if first else ())
            continue
        if first and (unedited or work.observe):
            alike = values[:, :1].expand(-1, len(unedited), -1, -1)
            yield from work.chunks(alike, ids, real, numbers, unedited, reader.take())
        if some:
            yield from work.chunks(values[:, 1:], ids, real, numbers, some)


def _unedited(
    work: _Work, batch: PromptBatch, past: Past | None, variants: tuple[int, ...]
) -> Iterator[Chunk]:
    """Run prompts and answers in one pass."""
    ids, real = work.answers_of(batch.rows)
    start = batch.tokens.shape[1] - 1
    tokens, padding = _with_answers(batch, ids)
    reader, entering = Reader(work.observe, start), Keep(lambda hidden: hidden[:, start:])
    hooks: list[tuple[str, Callable[..., Any]]] = [*reader.hooks, (ENTERS, entering)]
    run_until(work.model, tokens, padding, hooks, ENTERS, past=past)
    hidden = rearrange(entering.take(), "row pos d -> row 1 pos d")
    alike = hidden.expand(-1, len(variants), -1, -1)
    yield from work.chunks(alike, ids, real, batch.rows, variants, reader.take())


def _at_prompt(intervention: Intervention, prompts: PromptBatch) -> Callable[..., Tensor]:
    everywhere = intervention.position is None
    columns = None if everywhere else prompts.columns(intervention.position)

    def hook_function(activation: Tensor, hook: Any = None) -> Tensor:
        if columns is None:
            return intervention(activation)
        return intervention.edit_at(activation, columns)

    return hook_function


def _with_answers(
    batch: PromptBatch, ids: Int[Tensor, "row answer_pos"]
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
