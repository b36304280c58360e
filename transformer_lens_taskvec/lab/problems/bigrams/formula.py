"""An associative memory with weights set by hand, and the closed formula of its logits.

The construction and the formula follow Wang and Sato (2024), who build on Bietti et al. (2023).
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from transformer_lens_taskvec.lab.problems.bigrams.memory import (
    AssociativeMemory,
    MemoryConfig,
    Positions,
    check_positions,
)

_SHARP = 100.0
"""The strength of the hand-set previous-token head: ``exp(-100)`` is nothing in float32."""
_NEVER = -1e4
"""A logit that no softmax notices."""


@runtime_checkable
class HasBigrams(Protocol):
    """What a hand-set memory takes from a problem.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import TriggeredBigrams
        >>> isinstance(TriggeredBigrams(), HasBigrams)
        True
    """

    @property
    def d_vocab(self) -> int:
        """Number of tokens."""
        ...

    @property
    def n_tokens(self) -> int:
        """Tokens in a sequence."""
        ...

    @property
    def log_bigrams(self) -> Float[Tensor, "token next"]:
        """``log pi_b(next | token)`` in float64."""
        ...


def hand_set(
    problem: HasBigrams,
    beta: float = 3.0,
    gamma: float = 8.0,
    *,
    positions: Positions = "relative",
    dtype: torch.dtype = torch.float32,
) -> AssociativeMemory:
    """Return a model whose weights are set by hand; its logits are :func:`predicted_logits`.

    With orthonormal ``e(v)``, ``f(v)``, ``u(v)`` for the tokens ``v`` and ``p(t)`` for the places,
    here the coordinates of the residual stream::

        layer 0    W_K: r(1), or p(t) for the key p(t - 1)      attend to the previous token
                   W_O W_V  =  sum_v f(v) e(v)'                 write it as f
        layer 1    W_Q' W_K =  beta sum_v e(v) f(v)'            the last token looks for its like
                   W_O W_V  =  gamma sum_v u(v) e(v)'           among the previous ones
                   W_F      =  sum_vw log pi_b(w|v) u(w) e(v)'  the global bigrams
        W_U        =  the u(v)

    This is the construction of Wang and Sato (2024), where ``f(v) = Phi e(v)`` is near-orthogonal
    by chance; here it is orthogonal by construction, so that the formula holds exactly. Their
    formula counts no predecessor of the first token, for which layer 0 attends to nothing.

    Args:
        problem: A :class:`TriggeredBigrams`, or anything with ``d_vocab``, ``n_tokens`` and
            ``log_bigrams``.
        beta: The strength of layer 1's keys: how much more a match weighs than any other token is
            ``exp(beta)``.
        gamma: The strength of layer 1's output.
        positions: ``"absolute"`` knows the places of a sequence of ``problem``; those beyond have
            an embedding of zeros.
        dtype: Of the parameters.

    Returns:
        The model, of width ``3 d_vocab``, and ``n_tokens`` more if positions are absolute.

    Raises:
        ValueError: If ``positions`` is neither, or a strength is not finite.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import hand_set
        >>> from transformer_lens_taskvec.lab.problems.bigrams import predicted_logits
        >>> from transformer_lens_taskvec.lab.problems.bigrams import TriggeredBigrams
        >>> problem = TriggeredBigrams()
        >>> tokens = problem.sample(4, torch.Generator().manual_seed(0)).xs
        >>> expected = predicted_logits(problem, tokens, 3.0, 8.0)
        >>> bool((hand_set(problem, 3.0, 8.0)(tokens) - expected).abs().max() < 1e-5)
        True
    """
    check_positions(positions)
    check_strengths(beta, gamma)
    n, n_places = problem.d_vocab, problem.n_tokens if positions == "absolute" else 0
    width = 3 * n + n_places
    cfg = MemoryConfig(
        n, 8 * problem.n_tokens, positions, n_offsets=3, d_model=width, dtype=torch.float64
    )
    model = AssociativeMemory(cfg)
    basis = torch.eye(width, dtype=torch.float64)
    e, f, u, p = basis[:n], basis[n : 2 * n], basis[2 * n : 3 * n], basis[3 * n :]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.W_E.copy_(e)
        model.W_U.copy_(u.T)
        blocks: Any = model.blocks
        first, second = (block.attn for block in blocks)
        scale = math.sqrt(width)  # scores are divided by it
        if positions == "absolute":
            model.W_pos[:n_places] = p
            first.w_q.copy_(2 * _SHARP * scale * p[:-1].T @ p[1:])
            first.w_k.copy_(p.T @ p)
        else:
            first.w_q.copy_(f[:1].T @ e.sum(0, keepdim=True))
            first.relative[:, 1] = 2 * _SHARP * scale * f[0]
        first.sink.fill_(_SHARP)
        first.w_v.copy_(torch.eye(width))
        first.w_o.copy_(f.T @ e)
        second.w_q.copy_(beta * scale * e.T @ e)
        second.w_k.copy_(e.T @ f)
        second.sink.fill_(_NEVER)
        second.w_v.copy_(torch.eye(width))
        second.w_o.copy_(gamma * u.T @ e)
        blocks[-1].w_ff.copy_(u.T @ problem.log_bigrams.T @ e)
    model.cfg.model_name, model.cfg.dtype = f"hand-set-{positions}", dtype
    return model.to(dtype).eval()


def predicted_logits(
    problem: HasBigrams, tokens: Int[Tensor, "batch token"], beta: float, gamma: float
) -> Float[Tensor, "batch token logit"]:
    """Return the logits of an associative memory at every token, by the closed formula.

    After ``T`` tokens, the last of which is ``q``, with ``k`` the tokens that follow an earlier
    ``q``, ``c_v`` how many of those are ``v``, and ``n_v`` how many of all ``T`` tokens are ``v``::

        logit(v) = log pi_b(v|q) + gamma (c_v e^beta + n_v - c_v) / (k e^beta + T - k)

    It follows from the construction of Wang and Sato (2024); see :func:`hand_set`.

    Args:
        problem: As for :func:`hand_set`.
        tokens: Token ids, ``[batch, token]``.
        beta: The strength of the keys.
        gamma: The strength of the output.

    Returns:
        Logits in float64, ``[batch, token, d_vocab]``.

    Raises:
        ValueError: If a strength is not finite.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.bigrams import predicted_logits
        >>> from transformer_lens_taskvec.lab.problems.bigrams import TriggeredBigrams
        >>> problem, tokens = TriggeredBigrams(), torch.tensor([[0, 9, 5, 0]])
        >>> boost = predicted_logits(problem, tokens, 3.0, 8.0)[0, -1] - problem.log_bigrams[0]
        >>> [round(float(boost[token]), 2) for token in (9, 0, 5, 7)]  # 8 e^3 / (e^3 + 3), ...
        [6.96, 0.69, 0.35, 0.0]
    """
    check_strengths(beta, gamma)
    strength = beta * follows_like(tokens).double()
    later = torch.ones(tokens.shape[1], tokens.shape[1], device=tokens.device).triu(1).bool()
    attention = strength.masked_fill(later, -torch.inf).softmax(-1)
    share = attention @ F.one_hot(tokens, problem.d_vocab).double()
    return problem.log_bigrams.to(tokens.device)[tokens] + gamma * share


def follows_like(tokens: Int[Tensor, "batch token"]) -> Bool[Tensor, "batch last token"]:
    """Whether the predecessor of a token is the same as the last one, for each last token.

    Tokens after the last one are False, and so is the first token, which has no predecessor.
    """
    same = rearrange(tokens, "batch t -> batch t 1") == rearrange(tokens, "batch s -> batch 1 s")
    return F.pad(same[..., :-1], (1, 0)).tril()


def check_strengths(beta: float, gamma: float) -> None:
    """Raise a ValueError unless both strengths are finite."""
    for name, value in (("beta", beta), ("gamma", gamma)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")
