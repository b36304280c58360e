"""A transformer of attention alone whose two layers can be an associative memory.

Bietti et al. (2023) and Wang and Sato (2024) study two layers of one head each, without layer norm.
The first layer's head writes the previous token next to each token; the second layer's head looks
for the tokens that followed earlier occurrences of the last token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from transformer_lens_taskvec.lab.model import check_size

Positions = Literal["relative", "absolute"]
"""How a model knows places: by embeddings of the distance between tokens, or of the place."""


@dataclass
class MemoryConfig:
    """The size of an :class:`AssociativeMemory`, with TransformerLens' names.

    Attributes:
        d_vocab: Number of tokens.
        n_ctx: The most tokens in a sequence, if positions are absolute; with relative ones a
            sequence may have any length.
        positions: ``"relative"`` or ``"absolute"``.
        n_offsets: The distances 0, 1, ... that have an embedding of their own, if positions are
            relative; the last one stands for all larger distances.
        feed_forward: Whether the last layer has a linear map after its head, which can hold the
            global bigrams.
        n_layers: Number of layers.
        n_heads: Heads per layer.
        d_model: Width of the residual stream.
        init: The scale of the initial weights; see :class:`RegressionConfig`.
        model_name: The model's name in results.
        device: Where the model is made.
        dtype: Of the parameters.

    Raises:
        ValueError: If a size is below 1, or ``positions`` is something else.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import MemoryConfig
        >>> MemoryConfig(d_vocab=30, n_ctx=64).d_head
        64
    """

    d_vocab: int
    n_ctx: int
    positions: Positions = "relative"
    n_offsets: int = 8
    feed_forward: bool = True
    n_layers: int = 2
    n_heads: int = 1
    d_model: int = 64
    init: Literal["gpt2", "fan_in"] = "fan_in"
    model_name: str = "associative-memory"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_size(self, "d_vocab", "n_ctx", "n_offsets")
        check_positions(self.positions)

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads


def check_positions(positions: str) -> None:
    """Raise a ValueError unless positions are relative or absolute."""
    if positions not in ("relative", "absolute"):
        raise ValueError(f"positions must be 'relative' or 'absolute', got {positions!r}")


class AssociativeMemory(HookedRootModule):
    """Layers of attention without layer norm or MLP, with TransformerLens' hook points.

    The last layer may end in a linear map (``hook_mlp_out``). A head can also attend to nothing: a
    null key of a learned logit, whose value is zero. The rows of ``hook_pattern`` then sum to less
    than 1. Without it the first token, which has no previous one, could only attend to itself.

    Args:
        cfg: The size.
        seed: Seed of the initial weights; the global random state is neither read nor changed.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import (
        ...     AssociativeMemory, MemoryConfig
        ... )
        >>> model = AssociativeMemory(MemoryConfig(d_vocab=30, n_ctx=64))
        >>> model(torch.zeros(5, 16, dtype=torch.long)).shape
        torch.Size([5, 16, 30])
        >>> "blocks.1.attn.hook_pattern" in model.hook_dict
        True
    """

    def __init__(self, cfg: MemoryConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))
        self.hook_embed = HookPoint()
        if cfg.positions == "absolute":
            self.W_pos = nn.Parameter(torch.empty(cfg.n_ctx, cfg.d_model))
            self.hook_pos_embed = HookPoint()
        self.blocks = nn.ModuleList(
            MemoryBlock(cfg, feed_forward=cfg.feed_forward and layer == cfg.n_layers - 1)
            for layer in range(cfg.n_layers)
        )
        self.W_U = nn.Parameter(torch.empty(cfg.d_model, cfg.d_vocab))
        self._init_weights(seed)
        self.to(device=cfg.device, dtype=cfg.dtype)
        setup: Callable[[], None] = super().setup  # names the hook points
        setup()

    def forward(self, tokens: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token logit"]:
        """Return the logits at every token.

        Raises:
            ValueError: If positions are absolute and the sequence is too long.
        """
        residual: Tensor = self.hook_embed(F.embedding(tokens, self.W_E))
        if self.cfg.positions == "absolute":
            if tokens.shape[1] > self.cfg.n_ctx:
                raise ValueError(
                    f"tokens have shape {list(tokens.shape)}; this model has absolute positions "
                    f"for at most {self.cfg.n_ctx} tokens"
                )
            residual = residual + self.hook_pos_embed(
                self.W_pos[: tokens.shape[1]].expand(len(tokens), -1, -1)
            )
        for block in self.blocks:
            residual = block(residual)
        return residual @ self.W_U

    def _init_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("sink"):
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, self._initial_scale(name), generator=generator)

    def _initial_scale(self, name: str) -> float:
        """The standard deviation of a weight, as for :class:`LabTransformer`."""
        if name.endswith(("w_o", "w_ff")):
            return 0.02 / math.sqrt(2 * self.cfg.n_layers)
        if self.cfg.init == "gpt2" or name in ("W_U", "W_pos"):
            return 0.02
        return 0.6 if name == "W_E" else 0.6 / math.sqrt(self.cfg.d_model)


class MemoryBlock(nn.Module):
    """Attention on the residual stream, and perhaps a linear map."""

    def __init__(self, cfg: MemoryConfig, *, feed_forward: bool) -> None:
        super().__init__()
        self.attn = MemoryAttention(cfg)
        self.hook_resid_pre = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_resid_post = HookPoint()
        self.w_ff: nn.Parameter | None = None
        if feed_forward:
            self.w_ff = nn.Parameter(torch.empty(cfg.d_model, cfg.d_model))
            self.hook_resid_mid = HookPoint()
            self.hook_mlp_out = HookPoint()

    def forward(
        self, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after the block."""
        residual = self.hook_resid_pre(residual)
        residual = residual + self.hook_attn_out(self.attn(residual))
        if self.w_ff is not None:
            residual = self.hook_resid_mid(residual)
            residual = residual + self.hook_mlp_out(F.linear(residual, self.w_ff))
        after: Tensor = self.hook_resid_post(residual)
        return after


class MemoryAttention(nn.Module):
    """Causal attention; the logit of a key is ``q . (k + r) / sqrt(d_head)``.

    ``r`` is the embedding of the distance (Shaw et al. 2018), if positions are relative.
    """

    def __init__(self, cfg: MemoryConfig) -> None:
        super().__init__()
        self.n_heads, self.d_head = cfg.n_heads, cfg.d_head
        square = cfg.d_model, cfg.d_model
        self.w_q = nn.Parameter(torch.empty(square))
        self.w_k = nn.Parameter(torch.empty(square))
        self.w_v = nn.Parameter(torch.empty(square))
        self.w_o = nn.Parameter(torch.empty(square))
        self.sink = nn.Parameter(torch.empty(cfg.n_heads))
        self.relative: nn.Parameter | None = None
        if cfg.positions == "relative":
            self.relative = nn.Parameter(torch.empty(cfg.n_heads, cfg.n_offsets, cfg.d_head))
        self.hook_q = HookPoint()
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """The output map of each head: a view, so that writing to it changes the model."""
        return rearrange(
            self.w_o, "d_model (head d_head) -> head d_head d_model", head=self.n_heads
        )

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """The output bias, which is zero."""
        return self.w_o.new_zeros(len(self.w_o))

    def forward(
        self, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the heads together add to the residual stream."""
        q, k, v = (
            rearrange(
                F.linear(residual, weight),
                "batch pos (head d_head) -> batch pos head d_head",
                head=self.n_heads,
            )
            for weight in (self.w_q, self.w_k, self.w_v)
        )
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        scores = einsum(q, k, "batch query head d, batch key head d -> batch head query key")
        if self.relative is not None:
            scores = scores + self._by_distance(q, self.relative)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = (scores / math.sqrt(self.d_head)).masked_fill(future, -torch.inf)
        scores = self.hook_attn_scores(scores)
        nothing = rearrange(self.sink, "head -> 1 head 1 1").expand(*scores.shape[:-1], 1)
        pattern = self.hook_pattern(torch.cat([scores, nothing], dim=-1).softmax(-1)[..., :-1])
        z = einsum(pattern, v, "batch head query key, batch key head d -> batch query head d")
        z = rearrange(self.hook_z(z), "batch query head d_head -> batch query (head d_head)")
        return F.linear(z, self.w_o)

    def _by_distance(
        self,
        q: Float[Tensor, "batch query head d_head"],
        relative: Float[Tensor, "head offset d_head"],
    ) -> Float[Tensor, "batch head query key"]:
        """``q . r`` for the distance of each key, the largest with an embedding for those beyond.

        Nothing is said of later keys, which are masked.
        """
        products = einsum(
            q, relative, "batch query head d, head offset d -> batch head query offset"
        )
        places = torch.arange(q.shape[1], device=q.device)
        distance = (places[:, None] - places).clamp(0, relative.shape[1] - 1)
        return products.gather(-1, distance.expand(*products.shape[:2], *distance.shape))
