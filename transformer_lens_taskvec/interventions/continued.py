"""The passes of a generation, and how interventions act in them.

They act on the prompt, and on the tokens that follow if asked to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from transformer_lens_taskvec.activations import Reader
from transformer_lens_taskvec.interventions.intervention import Intervention, altered
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.models.beams import search_beams
from transformer_lens_taskvec.models.decoding import Decoding, choice_of
from transformer_lens_taskvec.models.forward import Hooks, new_cache, run_cached, run_prompts
from transformer_lens_taskvec.models.past import Past
from transformer_lens_taskvec.models.tokens import PromptBatch


@dataclass
class Continued:
    """One prompt's continuation so far.

    Attributes:
        ids: Its tokens.
        logprobs: The log-probability of each, under the model as it ran.
        scores: By which each was chosen, if they are kept.
        activations: At the last prompt token and at each of its tokens, if they are kept.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    activations: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """How prompts are continued, and what is kept of it.

    Attributes:
        model: The model.
        decoding: How tokens are chosen.
        prompts: The tokens of all prompts.
        hooks: ``(prompts, seen)``: the hooks of a pass over prompts from position ``seen`` on.
        names: Full names of hook points to read.
        keeps_scores: Whether scores are kept.
        streamer: Is given the tokens of a single prompt as they come, or None.
        use_cache: Whether to keep a KV cache.
    """

    model: Any
    decoding: Decoding
    prompts: Sequence[Sequence[int]]
    hooks: Callable[[PromptBatch, int], Hooks]
    names: Sequence[str]
    keeps_scores: bool
    streamer: Any
    use_cache: bool

    def continued(self, batch: PromptBatch, past: Past | None) -> list[Continued]:
        """Return the continuations of a batch of prompts behind what stands before them."""
        if self.decoding.n_beams > 1:
            best = search_beams(
                self.model, batch, self.decoding, self.hooks, use_cache=self.use_cache
            )
            return [Continued(ids) for ids in best]
        return self._one_by_one(batch, past)

    def _one_by_one(self, batch: PromptBatch, past: Past | None) -> list[Continued]:
        cache = new_cache(self.model, len(batch.rows), past) if self.use_cache else None
        tokens, seen = batch.tokens, 0
        mask = batch.mask if past is None else torch.cat([past.mask, batch.mask], dim=1)
        choice = choice_of(self.model, self.decoding, self.prompts, batch.rows)
        reader = Reader(self.names, -1)
        found = [Continued() for _ in batch.rows]
        going = dict(enumerate(found))
        self._stream(torch.tensor([self.prompts[0]]))
        for step in range(self.decoding.max_new_tokens + 1):
            is_over = not going or step == self.decoding.max_new_tokens
            if is_over and not self.names:
                break
            active = [*self.hooks(batch, seen), *reader.hooks]
            if cache is None:
                padding = None if batch.padding is None else mask
                logits = run_prompts(self.model, tokens, padding, active)[:, -1]
            else:
                logits = run_cached(self.model, tokens[:, seen:], mask, cache, active)[:, -1]
                seen = tokens.shape[1]
            if self.names:
                _keep_activations(reader, found)
            if is_over:
                break
            scores = choice.scores(logits, [one.ids for one in found])
            chosen = choice.tokens(scores)
            self._stream(chosen)
            tokens = torch.cat([tokens, rearrange(chosen, "row -> row 1")], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            logprobs = logits.float().log_softmax(dim=-1).gather(1, tokens[:, -1:])[:, 0]
            # Both come off the device at once: float64 holds token ids exactly.
            new = torch.stack([chosen.double(), logprobs.double()], dim=1).tolist()
            for row, one in list(going.items()):
                one.ids.append(int(new[row][0]))
                one.logprobs.append(new[row][1])
                if self.keeps_scores:
                    one.scores.append(scores[row].cpu())
                if self.decoding.is_finished(
                    self.model, self.prompts[batch.rows[row]], one.ids, scores[row]
                ):
                    del going[row]
        if self.streamer is not None:
            self.streamer.end()
        return found

    def _stream(self, tokens: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())


def _keep_activations(reader: Reader, found: Sequence[Continued]) -> None:
    """Keep those at the last position, of continuations that it belongs to."""
    kept = reader.take()
    assert kept is not None
    for one, own in zip(found, kept.to("cpu", torch.float32), strict=True):
        if len(one.activations) <= len(one.ids):
            one.activations.append(own)


def hooks_of_pass(
    hooks: Variant,
    prompts: PromptBatch,
    seen: int,
    *,
    first: int | None = 0,
    decay: float = 1.0,
    everywhere: bool = False,
) -> list[tuple[str, Callable[..., Any]]]:
    """Return the hooks of a pass over the positions from ``seen`` on.

    Args:
        hooks: Interventions, and pairs of a hook name and a hook function, which act in every pass.
        prompts: The prompts alone.
        seen: The number of positions before the pass, padding included.
        first: On how many tokens after the prompt interventions act too; None for all.
        decay: The factor of their scales per such token.
        everywhere: Whether those at every position act on all tokens after the prompt.
    """
    found: list[tuple[str, Callable[..., Any]]] = []
    for hook in hooks:
        if not isinstance(hook, Intervention):
            name, hook_function = hook
            found.append((name, hook_function))
            continue
        n = None if everywhere and hook.position is None else first
        if not seen or n is None or seen - prompts.tokens.shape[1] < n:
            found.append((hook.name, _acting(hook, prompts, seen, n, decay)))
    return found


def _acting(
    intervention: Intervention, prompts: PromptBatch, seen: int, first: int | None, decay: float
) -> Callable[..., Tensor]:
    columns = None if seen else prompts.columns(intervention.position)
    start = prompts.tokens.shape[1] - seen

    def hook_function(activation: Tensor, hook: Any = None) -> Tensor:
        n_rows, end = activation.shape[:2]
        edited = activation if columns is None else intervention.edit_at(activation, columns)
        until = end if first is None else min(end, start + first)
        after = torch.arange(max(start, 0), until, device=activation.device)
        if decay == 1:
            return intervention.edit_at(edited, repeat(after, "at -> row at", row=n_rows))
        for at in after.tolist():
            weaker = altered(intervention, scale=intervention.scale * decay ** (at - start + 1))
            edited = weaker.edit_at(edited, after.new_full((n_rows, 1), at))
        return edited

    return hook_function
