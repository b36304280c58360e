"""Vectors of all layers trained at once, against one training per layer.

pytest tests/benchmarks/test_learned_speed.py -s
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import transformer_lens_taskvec as tv

STEPS = 3


def test_thirty_learned_vectors(compare: Callable[..., float], smollm2: Any) -> None:
    """Each of the thirty trainings keeps its prompts' keys and values too."""
    tasks = tv.find_tasks(["singular_plural"])
    episodes = tv.zero_shot(tv.sample_episodes(tasks, n=10, n_shots=0, seed=0))
    layers = list(range(int(smollm2.cfg.n_layers)))

    def trained(some: list[int]) -> Tensor:
        losses: list[Tensor] = []
        tv.vectors.learn_vectors(
            smollm2,
            episodes,
            layers=some,
            steps=STEPS,
            report=lambda task, step, loss: losses.append(loss),
        )
        return torch.stack(losses)

    def agree(ours: Tensor, theirs: Tensor) -> str:
        worst = float((ours - theirs).abs().max())
        assert worst < 1e-3
        return f"losses within {worst:.0e}"

    compare(
        f"{len(layers)} learned vectors, ten zero-shot prompts",
        "one training per layer, prompts cached",
        3.0,
        lambda: trained(layers),
        lambda: torch.cat([trained([layer]) for layer in layers], dim=1),
        rounds=1,
        agree=agree,
    )
