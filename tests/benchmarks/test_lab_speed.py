"""A training step of the `paper` preset against Hugging Face's GPT-2 of the same size.

pytest tests/benchmarks/test_lab_speed.py -s
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from transformer_lens_taskvec.lab import PRESETS, TrainConfig, interleave
from transformer_lens_taskvec.lab.training.loop import _optimizers

BATCH = 32


class HuggingFaceGPT2(nn.Module):
    """Garg et al.'s model: a GPT-2 between a linear read-in and a linear read-out."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        n_positions = 2 * config.problem.n_points - 1
        self.backbone = GPT2Model(
            GPT2Config(
                vocab_size=1,
                n_positions=n_positions,
                n_embd=config.d_model,
                n_layer=config.n_layers,
                n_head=config.n_heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
            )
        )
        self.read_in = nn.Linear(config.problem.dim, config.d_model)
        self.read_out = nn.Linear(config.d_model, 1)

    def forward(self, xs: Tensor, ys: Tensor) -> Tensor:
        embedded = self.read_in(interleave(xs, ys))
        states = self.backbone(inputs_embeds=embedded).last_hidden_state
        return self.read_out(states)[:, ::2, 0]


@pytest.mark.parametrize(("autocast", "target"), [(False, 1.5), (True, 1.5)])
def test_paper_step(compare: Callable[..., float], autocast: bool, target: float) -> None:
    config = PRESETS["paper"]
    assert isinstance(config, TrainConfig)
    ours, theirs = config.model(), HuggingFaceGPT2(config)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[1]
    optimizer = torch.optim.Adam(theirs.parameters(), lr=config.learning_rate, betas=config.betas)
    generator = torch.Generator().manual_seed(0)

    def step(model: Any, optimizers: Any, autocast: bool) -> None:
        batch = config.problem.sample(BATCH, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            predicted = model(batch.xs, batch.ys)
        (predicted.float() - batch.ys).square().mean().backward()
        for each in optimizers:
            each.step()
            each.zero_grad()

    mine = _optimizers(ours, config)
    name = "bfloat16 autocast" if autocast else "float32"
    ratio = compare(
        f"training step, paper's size, {name}",
        "HF GPT-2, float32",
        target,
        lambda: step(ours, mine, autocast),
        lambda: step(theirs, [optimizer], False),
        rounds=9,
    )
    assert ratio >= (target if autocast else 1.0)
