"""Muon for many small matrices: one batched orthogonalisation per shape, not one per matrix.

The update of a matrix is its momentum with all singular values set to about one (Jordan et al.
2024), by five Newton-Schulz steps. ``torch.optim.Muon`` does the same one matrix at a time, in
bfloat16; for the lab's small models on a CPU most of that is overhead. A three-dimensional
parameter is a stack of matrices, each orthogonalised on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

_STEPS, _COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """Momentum, orthogonalised.

    The step of a matrix with ``r`` rows and ``c`` columns is ``lr * sqrt(max(1, r / c))`` times the
    orthogonalised Nesterov momentum, as in ``torch.optim.Muon``.

    Args:
        params: Parameters of two dimensions, or of three for stacks of matrices.
        lr: Learning rate.
        momentum: Decay of the running mean of gradients.
        weight_decay: Decoupled: each step shrinks a parameter by ``lr * weight_decay`` of itself.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 3e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(list(params), settings)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim not in (2, 3):
                    raise ValueError(
                        "Muon takes matrices or stacks of them, got a parameter of shape "
                        f"{list(parameter.shape)}; give it to another optimiser"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(params, group)
        return loss

    def _step_group(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        same_shape: dict[tuple[int, ...], list[int]] = {}
        for index, update in enumerate(updates):
            same_shape.setdefault(tuple(sorted(update.shape[-2:])), []).append(index)
        for members in same_shape.values():
            wide = [_wide_stack(updates[i]) for i in members]
            pieces = orthogonalized(torch.cat(wide)).split([*map(len, wide)])
            for i, piece in zip(members, pieces, strict=True):
                rows, columns = params[i].shape[-2:]
                scale = max(1.0, rows / columns) ** 0.5
                update = piece.mT if rows > columns else piece
                params[i].add_(update.reshape(params[i].shape), alpha=-group["lr"] * scale)


def orthogonalized(
    matrices: Float[Tensor, "matrix row column"],
) -> Float[Tensor, "matrix row column"]:
    """Each matrix, at least as wide as high, with singular values of about one (0.5 to 1.5)."""
    a, b, c = _COEFFICIENTS
    x: Tensor = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _wide_stack(tensor: Tensor) -> Float[Tensor, "matrix row column"]:
    """The matrices of a parameter, each with its shorter side first."""
    stack = rearrange(tensor, "... row column -> (...) row column")
    return stack.mT if stack.shape[1] > stack.shape[2] else stack
