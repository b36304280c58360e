"""What a plan says is what then runs: every forward call, and every token that enters a block."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.interventions.packed import Variant
from transformer_lens_taskvec.models import counted
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.counted import Count, Counted
from transformer_lens_taskvec.models.protocol import inference

pytestmark = pytest.mark.filterwarnings("ignore:.*one intervention at a time")


@dataclass
class Ran:
    """What a real model was made to run."""

    calls: int = 0
    entering: int = 0
    depth: int = 1

    @property
    def tokens(self) -> int:
        return round(self.entering / self.depth)


@contextmanager
def watching(model: Any) -> Iterator[Ran]:
    """Count forward calls, and the tokens that enter each block, on the model itself."""
    ran = Ran(depth=int(model.cfg.n_layers))
    run = model.run_with_hooks

    def call(*args: Any, **kwargs: Any) -> Any:
        ran.calls += 1
        return run(*args, **kwargs)

    handles = []
    for layer in range(ran.depth):
        # Behind the hooks of the engine, which narrow a block's input; where a block can be asked
        # only through its hook point, that is where they act already.
        inner = model.blocks[layer].ln1

        def enter(module: Any, args: Any, kwargs: Any = None) -> None:
            found = args[0] if args else next(iter(kwargs.values()))
            ran.entering += found.shape[:2].numel()

        handles.append(inner.register_forward_pre_hook(enter, with_kwargs=True))
    model.__dict__["run_with_hooks"] = call
    try:
        yield ran
    finally:
        del model.__dict__["run_with_hooks"]
        for handle in handles:
            handle.remove()


def ready(model: Any, episodes: Any, variants: Any, **options: Any) -> None:
    """What a model is asked once: what it can do, and the shapes at its hook points."""
    with inference(model):
        capabilities(model)
    tv.evaluate_many(model, list(episodes)[:1], variants, **options)


def check(model: Any, episodes: Any, variants: Any, **options: Any) -> tv.Plan:
    plan = tv.plan(model, episodes, variants, tokens_per_second=1000, **options)
    count = Count()
    stood_in = tv.evaluate_many(Counted(model, count), episodes, variants, **options)
    ready(model, episodes, variants, **options)
    # The hooks that watch must not be taken for the caller's.
    enter = torch.nn.Module.register_forward_pre_hook
    assert enter is not None
    with watching(model) as ran, pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformer_lens_taskvec.models.carried._OWN", ("t", "a", "test_plan"))
        found = tv.evaluate_many(model, episodes, variants, **options)
    assert type(stood_in) is type(found)
    assert (plan.passes, plan.tokens) == (ran.calls, ran.tokens)
    assert plan.passes == len(count.passes)
    assert plan.seconds == plan.tokens / 1000 and plan.peak_memory > 0
    return plan


def all_layers(vectors: tv.TaskVectors, task: str = "en_fr") -> list[Variant]:
    return [[], *(vectors.inject(task, layer) for layer in vectors.layers)]


@pytest.mark.model
@pytest.mark.parametrize("n_edits", [0, 1, 3])
@pytest.mark.parametrize("observe", [None, tv.Observe("resid_post", [1])])
def test_a_plan_is_what_runs(
    model: Any,
    episodes: list[tv.Episode],
    vectors: tv.TaskVectors,
    n_edits: int,
    observe: tv.Observe | None,
) -> None:
    options = {} if observe is None else {"observe": observe}
    check(model, episodes, all_layers(vectors)[: 1 + n_edits], **options)
    check(model, episodes, all_layers(vectors)[: 1 + n_edits], max_tokens=60, **options)
    check(model, tv.zero_shot(episodes), lambda task: all_layers(vectors, task), **options)
