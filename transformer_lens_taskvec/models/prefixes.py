"""Which tokens prompts have in common, and in which steps they run so that these run once.

Few-shot prompts with the same demonstrations, or the same instruction, begin with the same tokens.
Such beginnings form a tree: its nodes are run from the root on, each behind the keys and values of
the node above, and a prompt's own tokens run behind the node that it ends in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from transformer_lens_taskvec.models.capabilities import Capabilities
from transformer_lens_taskvec.models.forward import run_prefix
from transformer_lens_taskvec.models.past import Past
from transformer_lens_taskvec.models.protocol import device_of
from transformer_lens_taskvec.models.tokens import (
    PromptBatch,
    Tokens,
    alike_in_length,
    pad_id,
    padded,
)

FEWEST = 4
"""The shortest beginning that is run apart, in tokens."""

_PASS = 1 << 25
"""What a pass costs beside its tokens, in multiplications per layer."""

_LAUNCH = 1 << 33
"""The same on an accelerator, which waits for its kernels to be launched."""

_FINER = 16
"""By how much less the beginnings save that are also tried, many of which run in one pass."""

_LIGHT = 4
"""How many tokens of the past weigh as much as one that runs."""


@dataclass(frozen=True)
class Step:
    """Tokens that run together.

    Attributes:
        level: How many steps lie before it; the last one of each lower level is its past.
        parents: The row of the step before that each row continues, none at level 0.
        tokens: Each row's tokens, without those of the steps before.
        rows: The prompts that end here; none if the step is only a beginning of others.
        before: The number of tokens before, padding included.
    """

    level: int
    parents: tuple[int, ...]
    tokens: tuple[Tokens, ...]
    rows: tuple[int, ...] = ()
    before: int = 0

    @property
    def width(self) -> int:
        """The number of tokens of the longest row."""
        return max(map(len, self.tokens))


@dataclass
class _Node:
    """A beginning: the tokens from ``start`` to ``end`` of all prompts below it."""

    start: int
    end: int
    first: int = -1
    rows: list[int] = field(default_factory=list)
    nodes: list[_Node] = field(default_factory=list)


def steps(
    prompts: Sequence[Tokens],
    *,
    budget: int,
    can: Capabilities,
    own: int | Sequence[int] = 1,
    fewest: int | None = None,
    most_rows: int | None = None,
) -> list[Step]:
    """Return the steps in which prompts run.

    Args:
        prompts: Each prompt's tokens.
        budget: The most tokens of a step, padding included.
        can: What the model can do.
        own: How many tokens at the end of each prompt must be in its own step.
        fewest: How many tokens must be saved for a step more; None if nothing is shared.
        most_rows: The most prompts of a step.
    """
    each: list[int | None] = [fewest]
    if fewest is not None:
        # Beginnings that save too little for a step of their own may share one with others.
        while (least := (each[-1] or 0) // _FINER) >= FEWEST:
            each.append(least)
    plans = [_steps(prompts, budget, can, own, one, most_rows) for one in each]
    return min(plans, key=lambda plan: sum(_cost(step) + (fewest or 0) for step in plan))


def _cost(step: Step) -> int:
    """Return the tokens that a step runs, padding included, and what those before it weigh."""
    return len(step.tokens) * (step.width + step.before // _LIGHT)


def _steps(
    prompts: Sequence[Tokens],
    budget: int,
    can: Capabilities,
    own: int | Sequence[int],
    fewest: int | None,
    most_rows: int | None,
) -> list[Step]:
    """Return the steps if a beginning is run apart wherever it saves ``fewest`` tokens."""
    after = [own] * len(prompts) if isinstance(own, int) else own
    together: list[int] = []
    if fewest is not None and can.packs and not isinstance(prompts[0], Tensor):
        together = [
            row
            for row, prompt in enumerate(prompts)
            if can.apart is None or len(prompt) <= can.apart
        ]
    tree = _tree(prompts, together, after, fewest or 0)
    tree.rows.extend(sorted(set(range(len(prompts))) - set(together)))
    found: list[Step] = []

    def sized(lengths: Sequence[int], before: int) -> list[tuple[int, ...]]:
        each = max(lengths) + before // _LIGHT
        size = max(1, budget // each)
        if most_rows is not None:
            size = min(size, most_rows)
        if before:
            return alike_in_length(lengths, size)
        return alike_in_length(lengths, size, same_length=not can.pads, apart=can.apart)

    def descend(level: int, nodes: Sequence[_Node], before: int) -> None:
        ends = [(place, row) for place, node in enumerate(nodes) for row in node.rows]
        own_tokens = [prompts[row][nodes[place].end :] for place, row in ends]
        found.extend(
            Step(
                level,
                tuple(ends[i][0] for i in some) if level else (),
                tuple(own_tokens[i] for i in some),
                tuple(ends[i][1] for i in some),
                before,
            )
            for some in (sized(list(map(len, own_tokens)), before) if ends else ())
        )
        below = [(place, node) for place, above in enumerate(nodes) for node in above.nodes]
        for some in sized([node.end - node.start for _, node in below], before) if below else ():
            tokens = tuple(
                prompts[node.first][node.start : node.end] for _, node in (below[i] for i in some)
            )
            step = Step(
                level, tuple(below[i][0] for i in some) if level else (), tokens, before=before
            )
            found.append(step)
            descend(level + 1, [below[i][1] for i in some], before + step.width)

    descend(0, [tree], 0)
    widest = max(step.before + step.width for step in found)
    if can.indexed is not None and widest > can.indexed and found[-1].level:
        # Attention that counts by index would count the padding between tokens too.
        return _steps(prompts, budget, can, own, None, most_rows)
    return found


def fewest_saved(model: Any) -> int:
    """Return how many tokens must be saved for a pass more to be worth it."""
    cost = _PASS if device_of(model).type == "cpu" else _LAUNCH
    return max(FEWEST, cost // (12 * int(model.cfg.d_model) ** 2))


def in_steps(model: Any, plan: Sequence[Step]) -> Iterator[tuple[PromptBatch, Past | None]]:
    """Yield the batches of a plan that end prompts, each with what stands before it.

    Run it inside :func:`~transformer_lens_taskvec.models.protocol.inference`.
    """
    device, pad = device_of(model), pad_id(model)
    kept: list[Past] = []
    for step in plan:
        del kept[step.level :]
        past = None
        if step.level:
            past = kept[-1].rows(torch.tensor(step.parents, device=device))
        batch = padded(step.tokens, step.rows, pad).to(device)
        if step.rows:
            yield batch, past
        else:
            kept.append(run_prefix(model, batch, past))


def _tree(prompts: Sequence[Tokens], rows: Sequence[int], own: Sequence[int], fewest: int) -> _Node:
    """Return the tree of beginnings that save at least ``fewest`` tokens each."""
    starts = {row: list(prompts[row][: len(prompts[row]) - own[row]]) for row in rows}
    order = sorted(rows, key=starts.__getitem__)
    common = [0, *(_common(starts[one], starts[other]) for one, other in pairwise(order))]

    def grow(node: _Node, low: int, high: int, least: int) -> None:
        """Put the rows from ``low`` to ``high`` below a node, apart where ``least`` are common."""
        start = low
        while start < high:
            end = start + 1
            while end < high and common[end] - node.end >= least:
                end += 1
            if end - start == 1:
                node.rows.append(order[start])
            else:
                shared = min(common[start + 1 : end])
                if (end - start - 1) * (shared - node.end) >= fewest:
                    child = _Node(node.end, shared, order[start])
                    node.nodes.append(child)
                    grow(child, start, end, FEWEST)
                else:
                    grow(node, start, end, shared - node.end + 1)
            start = end

    root = _Node(0, 0)
    grow(root, 0, len(order), FEWEST)
    return root


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginnings."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
