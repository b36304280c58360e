"""Losses of answers under interventions, with gradients that reach the interventions' vectors.

The packed engine's passes without their ``no_grad``: prompts run once without gradients, their keys
and values are kept, and the variants run behind them as branches, forward and backward on those
only that differ by then. Where a model or an intervention rules this out, each variant runs on
whole prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from transformer_lens_taskvec.interventions.branches import branch_hooks
from transformer_lens_taskvec.interventions.packed import prompt_hooks
from transformer_lens_taskvec.interventions.variants import (
    Variant,
    acts_at_end,
    at_separators,
    branching,
)
from transformer_lens_taskvec.models.capabilities import Capabilities, capabilities
from transformer_lens_taskvec.models.forward import run_branches, run_prefix, run_prompts
from transformer_lens_taskvec.models.limits import check_lengths
from transformer_lens_taskvec.models.past import Past
from transformer_lens_taskvec.models.protocol import device_of, inference, model_name
from transformer_lens_taskvec.models.tokens import (
    PromptBatch,
    alike_in_length,
    encode_answers,
    encode_prompts,
    pad_id,
    padded,
    right_padded,
)
from transformer_lens_taskvec.prompts import AnyEpisode


@dataclass(frozen=True)
class Trial:
    """Some episodes, ready for losses with gradients.

    Attributes:
        parts: Batches of the episodes.
        n: The number of episodes.
    """

    parts: tuple[_Part, ...]
    n: int

    def losses(self, variants: Sequence[Variant]) -> Float[Tensor, "row variant"]:
        """Return the loss of each episode's answer under each variant.

        That is the answer's negative log-likelihood in nats, or the squared error where answers
        are numbers.

        Args:
            variants: Interventions, not functions of the caller's own.
        """
        found = torch.cat([part.losses(variants) for part in self.parts])
        order = torch.tensor([row for part in self.parts for row in part.rows]).argsort()
        return found[order.to(found.device)]


@contextmanager
def trials(
    model: Any, batches: Sequence[Sequence[AnyEpisode]], *, stop: str | None = None
) -> Iterator[list[Trial]]:
    """Prepare batches of episodes for losses with gradients, and enable these.

    Args:
        model: Any model with TransformerLens' hook API through which gradients flow; its weights
            get none.
        batches: The episodes of each pass.
        stop: As for :func:`evaluate`.

    Raises:
        ValueError: If the model carries hooks of the caller's, or as for :func:`evaluate`.
    """
    can = capabilities(model)
    if can.hooked:
        raise ValueError(
            f"{model_name(model)} carries hooks of yours, written for passes without gradients; "
            "remove them (model.reset_hooks(including_permanent=True))"
        )
    with inference(model):
        found = [_trial(model, can, episodes, stop) for episodes in batches]
        with torch.inference_mode(False), torch.enable_grad():
            yield found


def descend(
    model: Any,
    episodes: Sequence[AnyEpisode],
    parameter: Tensor,
    variants_of: Callable[[Tensor], Sequence[Variant]],
    *,
    steps: int,
    batch_size: int,
    rate: float,
    penalty: Callable[[Tensor], Tensor] | None = None,
    stop: str | None = None,
    seed: int = 0,
    report: Callable[[int, Float[Tensor, " variant"]], None] | None = None,
) -> Tensor:
    """Return a parameter trained with Adam against the answers' losses, summed over variants.

    Args:
        model: As for :func:`trials`.
        episodes: What to train on. Batches are fixed, so that their prompts run once; their order
            is shuffled, and each comes once before any comes again.
        parameter: Where training begins.
        variants_of: The variants that a parameter makes.
        steps: The number of steps.
        batch_size: Episodes per step.
        rate: Adam's.
        penalty: What is added to the loss, of the parameter.
        stop: As for :func:`evaluate`.
        seed: Seed of the batches.
        report: Called in every step with its number and the variants' mean losses before it.

    Raises:
        ValueError: If a number is out of range, a loss is not finite, no gradient flows, or as for
            :func:`trials`.
    """
    if steps < 0 or batch_size < 1 or not rate > 0:
        raise ValueError(
            f"steps is {steps}, batch_size {batch_size} and rate {rate}; they must be at least 0, "
            "at least 1, and above 0"
        )
    rng = random.Random(seed)
    order = rng.sample(list(episodes), len(episodes))
    n_batches = -(-len(order) // batch_size)
    found = parameter.detach().clone().to(device_of(model)).requires_grad_()
    optimizer = torch.optim.Adam([found], lr=rate)
    with trials(model, [order[i::n_batches] for i in range(n_batches)], stop=stop) as batches:
        left: list[Trial] = []
        for step in range(steps):
            left = left or rng.sample(batches, len(batches))
            losses = left.pop().losses(variants_of(found)).mean(dim=0)
            total = losses.sum() if penalty is None else losses.sum() + penalty(found)
            if not losses.requires_grad:
                raise ValueError(
                    f"no gradients flow through the passes of {model_name(model)}, so nothing can "
                    "be trained in it"
                )
            if not bool(total.isfinite()):
                raise ValueError(
                    f"the loss is {float(total.detach())} after {step} steps; use a lower rate"
                )
            (found.grad,) = torch.autograd.grad(total, [found])
            optimizer.step()
            if report is not None:
                report(step, losses.detach().cpu())
    return found.detach().cpu()


@dataclass(frozen=True)
class _Part:
    """Prompts that run in one pass.

    Attributes:
        model: The model.
        can: What it can do.
        batch: The prompts, or for a model of the lab its vectors.
        past: The keys and values of all tokens but the prompts' last; None where variants run on
            whole prompts.
        ids: The answers' tokens, right-padded; of a model of the lab, nothing.
        real: Where these are real.
        episodes: The episodes.
        rows: Their places in the trial.
    """

    model: Any
    can: Capabilities
    batch: PromptBatch
    past: Past | None
    ids: Tensor
    real: Tensor
    episodes: Sequence[AnyEpisode]
    rows: tuple[int, ...]

    def losses(self, variants: Sequence[Variant]) -> Float[Tensor, "row variant"]:
        placed = at_separators(self.model, variants, self.episodes)
        together: list[int] = []
        if self.past is not None:
            together = [i for i, variant in enumerate(placed) if all(map(acts_at_end, variant))]
        found = self._of_branches(placed, together) if together else {}
        for index, variant in enumerate(placed):
            if index not in found:
                found[index] = self._of_whole(variant)
        return torch.stack([found[index] for index in range(len(placed))], dim=1)

    def _of_branches(
        self, variants: Sequence[Variant], chosen: Sequence[int]
    ) -> dict[int, Float[Tensor, " row"]]:
        assert self.past is not None
        branches = branching(self.model, variants, chosen, shares_layers=self.can.shares_layers)
        shares = self.can.shares_layers and max(branches.first, default=0) > 1
        alone: list[Variant] = [()] if shares or branches.unedited else []
        edits = [*alone, *branches.edits]
        branch = torch.cat([self.batch.tokens[:, -1:], self.ids[:, :-1]], dim=1)
        n_layers = int(self.model.cfg.n_layers)
        active = branches.active(0, len(branches.edited), n_layers) if shares else None
        logits = run_branches(
            self.model,
            repeat(branch, "row pos -> row (branch pos)", branch=len(edits)),
            self.past,
            branch_hooks(self.model, edits, branch.shape[1]),
            n_branches=len(edits),
            active=active,
        )
        by_branch = rearrange(logits, "row (branch pos) d -> branch row pos d", branch=len(edits))
        losses = [self._nll(one) for one in by_branch]
        found = dict.fromkeys(branches.unedited, losses[0])
        found.update(zip(branches.edited, losses[len(alone) :], strict=True))
        return found

    def _of_whole(self, variant: Variant) -> Float[Tensor, " row"]:
        hooks = prompt_hooks(variant, self.batch)
        if isinstance(self.episodes[0].prompt, Tensor):
            predicted = self.model.run_with_hooks(self.batch.tokens, fwd_hooks=hooks)
            last = predicted[:, -1:].float()
            episodes: Sequence[Any] = self.episodes
            pairs = zip(episodes, last, strict=True)
            return torch.cat([episode.losses(one) for episode, one in pairs])
        tokens = torch.cat([self.batch.tokens, self.ids[:, :-1]], dim=1)
        padding = self.batch.padding
        if padding is not None:
            more = torch.ones_like(self.ids[:, :-1], dtype=torch.bool)
            padding = torch.cat([padding, more], dim=1)
        logits = run_prompts(self.model, tokens, padding, hooks)
        return self._nll(logits[:, self.batch.tokens.shape[1] - 1 :])

    def _nll(self, logits: Float[Tensor, "row answer_pos vocab"]) -> Float[Tensor, " row"]:
        of_answer = logits.gather(-1, rearrange(self.ids, "row pos -> row pos 1"))[..., 0].float()
        logp = of_answer - logits.float().logsumexp(dim=-1)
        return -(logp * self.real).sum(dim=1)


def _trial(
    model: Any, can: Capabilities, episodes: Sequence[AnyEpisode], stop: str | None
) -> Trial:
    prompts, _ = encode_prompts(model, episodes)
    numbers = isinstance(prompts[0], Tensor)
    answers = [] if numbers else encode_answers(model, episodes, stop=stop)
    check_lengths(model, prompts, answers)
    after = max(map(len, answers), default=1) - 1
    limit = None if can.apart is None else can.apart - after
    lengths = list(map(len, prompts))
    groups = alike_in_length(
        lengths, len(prompts), same_length=numbers or not can.pads, apart=limit
    )
    device, parts = device_of(model), []
    for rows in groups:
        some = [episodes[row] for row in rows]
        here = range(len(rows))
        batch = padded([prompts[row] for row in rows], here, 0 if numbers else pad_id(model))
        batch = batch.to(device)
        packs = can.packs and (limit is None or batch.tokens.shape[1] <= limit)
        past = run_prefix(model, batch.before_last()) if packs and not numbers else None
        if numbers:
            ids = torch.zeros(len(some), 1, device=device)
            real = torch.zeros_like(ids, dtype=torch.bool)
        else:
            ids, real = right_padded([answers[row] for row in rows], device)
        parts.append(_Part(model, can, batch, past, ids, real, some, rows))
    return Trial(tuple(parts), len(episodes))
