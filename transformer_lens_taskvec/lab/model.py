"""A GPT-2 that reads vectors and predicts numbers, with TransformerLens' hook points.

The sequence ``x_1, y_1, x_2, y_2, ..., x_n`` has ``2 n - 1`` tokens. A token is a real vector, read
in by a linear layer: an ``x`` unchanged, a ``y`` as the first coordinate with zeros elsewhere. The
prediction of ``y_i`` is read out linearly at the token of ``x_i`` (Garg et al. 2022; Han et al.
2025, App. D). The last token is therefore the query, right before the ``y`` to be predicted, as
position -1 is in a text prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint


@runtime_checkable
class ModelSize(Protocol):
    """The size of a model, as the settings of a training give it."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        ...

    @property
    def n_heads(self) -> int:
        """Attention heads per block."""
        ...

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        ...

    @property
    def init(self) -> Literal["gpt2", "fan_in"]:
        """The scale of the initial weights; see :class:`RegressionConfig`."""
        ...


@dataclass
class RegressionConfig:
    """The size of a :class:`RegressionTransformer`, with TransformerLens' names.

    Attributes:
        d_input: The dimension of an input ``x``.
        n_points: The largest number of pairs (x, y) in a sequence.
        n_layers: Number of blocks.
        n_heads: Attention heads per block.
        d_model: Width of the residual stream.
        init: ``"gpt2"`` for weights of standard deviation 0.02; ``"fan_in"`` for larger ones, which
            keep the scale of activations. In both, projections back into the residual stream start
            smaller.
        d_output: Numbers in an output.
        model_name: The model's name in results.
        device: Where the model is made.
        dtype: Of the parameters.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> config = lab.RegressionConfig(d_input=8, n_points=16, n_layers=2, n_heads=4, d_model=64)
        >>> config.d_head, config.n_ctx
        (16, 31)
    """

    d_input: int = 16
    n_points: int = 20
    n_layers: int = 12
    n_heads: int = 8
    d_model: int = 256
    init: Literal["gpt2", "fan_in"] = "gpt2"
    d_output: int = 1
    model_name: str = "regression-transformer"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_size(self, "d_input", "n_points", "d_output")

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def d_mlp(self) -> int:
        """Width of an MLP's hidden layer."""
        return 4 * self.d_model

    @property
    def n_ctx(self) -> int:
        """The largest number of tokens in a sequence."""
        return 2 * self.n_points - 1


def check_size(settings: Any, *others: str) -> None:
    """Raise a ValueError unless a model has this size and the other settings are 1 or more."""
    for name in (*others, "n_layers", "n_heads", "d_model"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    if settings.d_model % settings.n_heads:
        raise ValueError(
            f"d_model must be a multiple of n_heads, got {settings.d_model} and {settings.n_heads}"
        )


@dataclass
class TokenConfig:
    """The size of a :class:`TokenTransformer`, with TransformerLens' names.

    Attributes:
        d_vocab: Number of tokens.
        n_ctx: The largest number of tokens in a sequence.
        n_layers: As for :class:`RegressionConfig`, like the rest.
        n_heads: Attention heads per block.
        d_model: Width of the residual stream.
        init: The scale of the initial weights.
        d_output: Number of logits; None for one per token.
        model_name: The model's name in results.
        device: Where the model is made.
        dtype: Of the parameters.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> lab.TokenConfig(d_vocab=30, n_ctx=64).d_head
        16
    """

    d_vocab: int
    n_ctx: int
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 64
    init: Literal["gpt2", "fan_in"] = "fan_in"
    d_output: int | None = None
    model_name: str = "token-transformer"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_size(self, "d_vocab", "n_ctx")

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def d_mlp(self) -> int:
        """Width of an MLP's hidden layer."""
        return 4 * self.d_model


class LabTransformer(HookedRootModule):
    """GPT-2 (pre-layer-norm, learned positions, GELU) without a read-in: what the two kinds share.

    The hook points have TransformerLens' names; ``model.hook_dict`` lists them. Attention patterns
    are computed only when a hook asks for them.

    Args:
        cfg: The size.
        read_in: What makes the residual stream of a model's input.
        n_outputs: Numbers that are read out at a token.
        seed: Seed of the initial weights; the global random state is neither read nor changed.
    """

    def __init__(
        self,
        cfg: RegressionConfig | TokenConfig,
        read_in: nn.Module,
        n_outputs: int,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.read_in = read_in
        self.W_pos = nn.Parameter(torch.empty(cfg.n_ctx, cfg.d_model))
        self.hook_embed = HookPoint()
        self.hook_pos_embed = HookPoint()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_final = HookedLayerNorm(cfg.d_model)
        self.read_out = nn.utils.skip_init(nn.Linear, cfg.d_model, n_outputs)
        self._init_weights(seed)
        self.to(device=cfg.device, dtype=cfg.dtype)
        setup: Callable[[], None] = super().setup  # names the hook points
        setup()

    def residual(
        self, tokens: Shaped[Tensor, "batch token *dim"]
    ) -> Float[Tensor, "batch token d_model"]:
        """The residual stream after the last block."""
        return self.through(self.embedded(tokens))

    def embedded(
        self,
        tokens: Shaped[Tensor, "batch token *dim"],
        places: Int[Tensor, "batch token"] | None = None,
    ) -> Float[Tensor, "batch token d_model"]:
        """The residual stream before the first block.

        Args:
            tokens: What the model reads.
            places: The place of each token in a full sequence, whose embedding it gets; by default
                ``0, 1, ...``.
        """
        embed = self.hook_embed(self.read_in(tokens))
        positions = (
            repeat(
                self.W_pos[: tokens.shape[1]], "pos d_model -> batch pos d_model", batch=len(tokens)
            )
            if places is None
            else self.W_pos[places]
        )
        before: Tensor = embed + self.hook_pos_embed(positions)
        return before

    def through(
        self,
        residual: Float[Tensor, "batch token d_model"],
        start: int = 0,
        stop: int | None = None,
    ) -> Float[Tensor, "batch token d_model"]:
        """The residual stream after the blocks from ``start`` to before ``stop``, or the last."""
        for block in self.blocks[start:stop]:
            residual = block(residual)
        return residual

    def _init_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("weight", "bias")) and "ln" in name:
                    parameter.fill_(float(name.endswith("weight")))
                elif "bias" in name:
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, self._initial_scale(name), generator=generator)

    def _initial_scale(self, name: str) -> float:
        """The standard deviation of a weight matrix: GPT-2's, or the one that trains fastest."""
        if name.endswith(("w_o", "w_out")):
            return 0.02 / math.sqrt(2 * self.cfg.n_layers)
        if self.cfg.init == "gpt2" or name in ("read_out.weight", "W_pos"):
            return 0.02
        return 0.6 / math.sqrt(self._fan_in if name == "read_in.weight" else self.cfg.d_model)

    @property
    def _fan_in(self) -> int:
        """The numbers that the read-in sums over."""
        return 1


class RegressionTransformer(LabTransformer):
    """A :class:`LabTransformer` with a linear read-in, which predicts at every second token.

    Args:
        cfg: The size.
        seed: Seed of the initial weights; the global random state is neither read nor changed.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> model = lab.RegressionTransformer(lab.RegressionConfig(d_input=8, n_layers=2))
        >>> model(torch.randn(5, 16, 8), torch.randn(5, 16)).shape
        torch.Size([5, 16])
    """

    cfg: RegressionConfig

    def __init__(self, cfg: RegressionConfig, *, seed: int = 0) -> None:
        read_in = nn.utils.skip_init(nn.Linear, cfg.d_input, cfg.d_model)
        super().__init__(cfg, read_in, cfg.d_output, seed=seed)

    def forward(
        self,
        xs: Float[Tensor, "batch point_or_token dim"],
        ys: Float[Tensor, "batch demo *output"] | None = None,
    ) -> Float[Tensor, "batch point *output"]:
        """Predict every ``y_i`` from the pairs before it and ``x_i``.

        Args:
            xs: Inputs, ``[batch, point, dim]``; or, without ``ys``, tokens as :func:`interleave`
                makes them.
            ys: Outputs, ``[batch, point]`` or without the last, which is never read; with an axis
                more if an output is of several numbers.

        Returns:
            Predictions, ``[batch, point]``, or ``[batch, point, output]`` if an output is of
            several numbers.

        Raises:
            ValueError: If the sequence is too long or its dimensions are not the model's.
        """
        tokens = xs if ys is None else interleave(xs, ys)
        n_tokens = tokens.shape[1]
        if n_tokens > self.cfg.n_ctx or tokens.shape[2] != self.cfg.d_input:
            raise ValueError(
                f"tokens have shape {list(tokens.shape)}; this model takes at most "
                f"{self.cfg.n_ctx} tokens ({self.cfg.n_points} points) of {self.cfg.d_input} "
                "dimensions"
            )
        readout: Tensor = self.read_out(self.ln_final(self.residual(tokens))[:, ::2])
        return readout.squeeze(-1) if self.cfg.d_output == 1 else readout

    @property
    def _fan_in(self) -> int:
        return self.cfg.d_input


class TokenTransformer(LabTransformer):
    """A :class:`LabTransformer` that reads tokens and gives logits at each of them.

    Args:
        cfg: The size.
        seed: Seed of the initial weights; the global random state is neither read nor changed.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> model = lab.TokenTransformer(lab.TokenConfig(d_vocab=30, n_ctx=64, n_layers=2))
        >>> model(torch.zeros(5, 16, dtype=torch.long)).shape
        torch.Size([5, 16, 30])
    """

    cfg: TokenConfig

    def __init__(self, cfg: TokenConfig, *, seed: int = 0) -> None:
        read_in = nn.utils.skip_init(nn.Embedding, cfg.d_vocab, cfg.d_model)
        super().__init__(cfg, read_in, cfg.d_output or cfg.d_vocab, seed=seed)

    def forward(self, tokens: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token logit"]:
        """Return the logits at every token.

        Raises:
            ValueError: If the sequence is too long.
        """
        if tokens.shape[1] > self.cfg.n_ctx:
            raise ValueError(
                f"tokens have shape {list(tokens.shape)}; this model takes at most "
                f"{self.cfg.n_ctx} tokens"
            )
        logits: Tensor = self.read_out(self.ln_final(self.residual(tokens)))
        return logits


class Block(nn.Module):
    """Attention and MLP, each on the layer-normalised residual stream."""

    def __init__(self, cfg: RegressionConfig | TokenConfig) -> None:
        super().__init__()
        self.ln1 = HookedLayerNorm(cfg.d_model)
        self.attn = Attention(cfg)
        self.ln2 = HookedLayerNorm(cfg.d_model)
        self.mlp = MLP(cfg)
        self.hook_resid_pre = HookPoint()
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after the block."""
        residual = self.hook_resid_pre(residual)
        residual = self.hook_resid_mid(residual + self.hook_attn_out(self.attn(self.ln1(residual))))
        residual = residual + self.hook_mlp_out(self.mlp(self.ln2(residual)))
        after: Tensor = self.hook_resid_post(residual)
        return after


class Attention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, cfg: RegressionConfig | TokenConfig) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.d_head = cfg.d_head
        self.w_qkv = nn.Parameter(torch.empty(3 * cfg.d_model, cfg.d_model))
        self.bias_qkv = nn.Parameter(torch.empty(3 * cfg.d_model))
        self.w_o = nn.Parameter(torch.empty(cfg.d_model, cfg.d_model))
        self.bias_o = nn.Parameter(torch.empty(cfg.d_model))
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
        """The output bias."""
        return self.bias_o

    def forward(
        self, normalized: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the heads together add to the residual stream."""
        q, k, v = rearrange(
            F.linear(normalized, self.w_qkv, self.bias_qkv),
            "batch pos (qkv head d_head) -> qkv batch pos head d_head",
            qkv=3,
            head=self.n_heads,
        )
        q = rearrange(self.hook_q(q), "batch query head d_head -> batch head query d_head")
        k = rearrange(self.hook_k(k), "batch key head d_head -> batch head key d_head")
        v = rearrange(self.hook_v(v), "batch key head d_head -> batch head key d_head")
        if self.hook_pattern.has_hooks() or self.hook_attn_scores.has_hooks():
            scores = q @ k.transpose(-1, -2) / math.sqrt(self.d_head)
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = self.hook_attn_scores(scores.masked_fill(future, -torch.inf))
            z = self.hook_pattern(scores.softmax(-1)) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        z = self.hook_z(rearrange(z, "batch head query d_head -> batch query head d_head"))
        z = rearrange(z, "batch query head d_head -> batch query (head d_head)")
        return F.linear(z, self.w_o, self.bias_o)


class MLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, cfg: RegressionConfig | TokenConfig) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model))
        self.bias_in = nn.Parameter(torch.empty(cfg.d_mlp))
        self.w_out = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.bias_out = nn.Parameter(torch.empty(cfg.d_model))
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()

    def forward(
        self, normalized: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the residual stream."""
        pre = self.hook_pre(F.linear(normalized, self.w_in, self.bias_in))
        return F.linear(self.hook_post(F.gelu(pre)), self.w_out, self.bias_out)


class HookedLayerNorm(nn.Module):
    """Layer norm with TransformerLens' hook point on its output."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.bias = nn.Parameter(torch.empty(d_model))
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The normalised residual stream."""
        normed = F.layer_norm(x, (x.shape[-1],), self.weight, self.bias)
        hooked: Tensor = self.hook_normalized(normed)
        return hooked


def lengthened(
    model: RegressionTransformer, n_points: int, *, seed: int = 0
) -> RegressionTransformer:
    """Return a copy of a model that takes longer sequences, without training.

    The embeddings of the added positions are random, as at the start of training. So are those that
    a model trained on shorter sequences than it takes has never seen (Saglam et al. 2025).

    Args:
        model: The model.
        n_points: The largest number of pairs (x, y) in a sequence, at least the model's.
        seed: Seed of the added embeddings.

    Raises:
        ValueError: If the model takes longer sequences already.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> model = lab.lengthened(lab.shipped_run().model(), 24)
        >>> model.cfg.n_ctx, model.W_pos.shape
        (47, torch.Size([47, 64]))
    """
    if n_points < model.cfg.n_points:
        raise ValueError(
            f"n_points is {n_points}, and the model takes {model.cfg.n_points}; ask for more"
        )
    longer = RegressionTransformer(replace(model.cfg, n_points=n_points), seed=seed)
    state = model.state_dict()
    added = longer.W_pos.detach()[len(state["W_pos"]) :]
    state["W_pos"] = torch.cat([state["W_pos"], added.to(state["W_pos"])])
    longer.load_state_dict(state)
    return longer.eval()


def interleave(
    xs: Float[Tensor, "batch point dim"], ys: Float[Tensor, "batch demo *output"]
) -> Float[Tensor, "batch token dim"]:
    """Return the tokens ``x_1, y_1, ..., x_n`` of sequences, without the last ``y``.

    Args:
        xs: Inputs, ``[batch, point, dim]``.
        ys: Outputs, ``[batch, point]``, or of all points but the last; with an axis more,
            ``[batch, point, output]``, if an output is of several numbers.

    Returns:
        Tokens, ``[batch, 2 * point - 1, dim]``; an output is the first coordinates of its token.

    Raises:
        ValueError: If there are not as many ``ys`` as ``xs``, or one fewer, or an output has more
            numbers than an input has dimensions.

    Example:
        >>> interleave(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[9.0]]))[0].tolist()
        [[1.0, 2.0], [9.0, 0.0], [3.0, 4.0]]
    """
    batch, n_points, dim = xs.shape
    if ys.shape[:2] not in ((batch, n_points), (batch, n_points - 1)):
        raise ValueError(
            f"ys has shape {list(ys.shape)}; expected {[batch, n_points]} or "
            f"{[batch, n_points - 1]} for xs of shape {list(xs.shape)}"
        )
    outputs = ys[..., None] if ys.ndim == 2 else ys
    if outputs.shape[2] > dim:
        raise ValueError(
            f"an output of {outputs.shape[2]} numbers does not fit into a token of {dim}, the "
            "dimension of an input"
        )
    tokens = xs.new_zeros(batch, 2 * n_points - 1, dim)
    tokens[:, ::2] = xs
    tokens[:, 1::2, : outputs.shape[2]] = outputs[:, : n_points - 1]
    return tokens
