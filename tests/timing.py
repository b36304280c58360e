"""What the benchmarks share: paired timing, the table of ratios, and sweeps as usually written."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import transformer_lens_taskvec as tv

ROWS: list[dict[str, Any]] = []
"""The table of ratios so far."""

Edit = Callable[[Tensor, int], None]


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, work queued on an accelerator included, and its result."""
    _synchronize()
    start = time.perf_counter()
    result = function()
    _synchronize()
    return time.perf_counter() - start, result


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def paired(
    ours: Callable[[], Any], other: Callable[[], Any], rounds: int
) -> tuple[float, float, Any, Any]:
    """Both medians in seconds, of calls in turn, and both last results."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        mine, our_result = seconds(ours)
        theirs, other_result = seconds(other)
        times.append((mine, theirs))
    our_times, other_times = zip(*times, strict=True)
    return statistics.median(our_times), statistics.median(other_times), our_result, other_result


def record(
    work: str, against: str, target: float, ratio: float, note: str = "", **more: float
) -> None:
    """Add a row to the table of ratios."""
    row = {"work": work, "against": against, "target": target, "ratio": round(ratio, 2)}
    numbers = {name: round(value, 3) for name, value in more.items()}
    ROWS.append({**row, **numbers, **({"note": note} if note else {})})


def table() -> str:
    """The table of ratios in Markdown."""
    lines = ["| work | against | at least | measured | agreement |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['work']} | {row['against']} | {row['target']:g} x | {row['ratio']:.1f} x "
        f"| {row.get('note', '')} |"
        for row in ROWS
    ]
    return "\n".join(lines)


class Padded(NamedTuple):
    """Left-padded prompts, each followed by its answer without the last token, right-padded.

    ``width`` is the prompts' length; ``answers`` is ``[row, answer_pos]``, -1 after the last token.
    """

    tokens: Tensor
    mask: Tensor
    width: int
    answers: Tensor


def padded(model: Any, episodes: Sequence[tv.Episode], device: Any = None) -> Padded:
    """The episodes as one batch, on the model's device."""
    encode = model.tokenizer.encode
    prompts = [encode(episode.prompt, add_special_tokens=False) for episode in episodes]
    answers = [encode(episode.answer, add_special_tokens=False) for episode in episodes]
    width, length = max(map(len, prompts)), max(map(len, answers))
    tokens = torch.full((len(prompts), width + length - 1), 2)
    mask, targets = torch.zeros_like(tokens), torch.full((len(prompts), length), -1)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        fed = torch.tensor(prompt + answer[:-1])
        tokens[row, width - len(prompt) :][: len(fed)] = fed
        mask[row, width - len(prompt) :] = 1
        targets[row, : len(answer)] = torch.tensor(answer)
    device = device or next(model.parameters()).device
    return Padded(tokens.to(device), mask.to(device), width, targets.to(device))


def losses(logits: Tensor, answers: Tensor) -> Tensor:
    """``[row]``, the NLL of each answer, from the logits ``[row, answer_pos, vocab]`` of it."""
    chosen = logits.float().log_softmax(-1).gather(2, answers.clamp(min=0)[..., None])[..., 0]
    return -(chosen * (answers >= 0)).sum(1)


def right(logits: Tensor, answers: Tensor) -> Tensor:
    """``[row]``, whether greedy decoding gives the answer."""
    return ((logits.argmax(-1) == answers) | (answers < 0)).all(1)


def plain_logits(
    model: Any, batch: Padded, hooks: Sequence[tuple[str, Any]] = (), **kwargs: Any
) -> Float[Tensor, "row answer_pos vocab"]:
    """The logits of the answers in one teacher-forced pass, with hooks."""
    with torch.no_grad():
        logits = model.run_with_hooks(
            batch.tokens, attention_mask=batch.mask, fwd_hooks=list(hooks), **kwargs
        )
    return logits[:, -batch.answers.shape[1] :]


def hook_loop(model: Any, episodes: list[tv.Episode], edits: list[tuple[str, Edit]]) -> Tensor:
    """One teacher-forced ``run_with_hooks`` for every edit: how sweeps are usually written.

    Returns ``[edit, row]``, the NLL of each answer.
    """
    batch = padded(model, episodes)
    found = []
    for name, edit in edits:

        def hook(activation: Tensor, hook: Any, edit: Edit = edit) -> Tensor:
            edit(activation, batch.width - 1)
            return activation

        logits = plain_logits(model, batch, [(name, hook)])
        found.append(losses(logits, batch.answers).cpu())
    return torch.stack(found)


def replacing(vector: Tensor, head: int | None = None) -> Edit:
    """The edit that puts a vector in place of the activation, or of one head's."""

    def edit(activation: Tensor, at: int) -> None:
        if head is None:
            activation[:, at] = vector
        else:
            activation[:, at, head] = vector

    return edit


def layer_edits(values: Tensor) -> list[tuple[str, Edit]]:
    """A vector in place of the residual stream after each block, from ``[layer, d_model]``."""
    return [(f"blocks.{i}.hook_resid_post", replacing(one)) for i, one in enumerate(values)]


SWEPT = {1: "country_continent", 3: "upper_case"}
"""The tasks of sweeps, by the number of tokens of an answer; five-shot prompts of 44 and 45."""


def task_with_answers(model: Any, n_tokens: int) -> tv.Task:
    """A task of :data:`SWEPT`, reduced to answers of that many tokens."""
    [task] = tv.find_tasks([SWEPT[n_tokens]]).values()
    encode = model.tokenizer.encode
    pairs = [
        pair
        for pair in task.sample(len(task), random.Random(0))  # all of them
        if len(encode(pair.y, add_special_tokens=False)) == n_tokens
    ]
    return tv.mapping_task(task.name, pairs)
