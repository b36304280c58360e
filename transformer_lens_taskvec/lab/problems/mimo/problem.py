"""In-context equalisation of a channel with several antennas (Zecchin, Yu and Simeone 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from transformer_lens_taskvec.lab.model import ModelSize
from transformer_lens_taskvec.lab.problems.base import (
    QUICK,
    Batch,
    Finding,
    Problem,
    draw_labels,
    normal,
)
from transformer_lens_taskvec.lab.problems.mimo.estimators import (
    channel_posterior,
    finite_prior,
    known_channel,
    linear_mmse,
    true_prior,
)
from transformer_lens_taskvec.lab.problems.mimo.finding import finding_of
from transformer_lens_taskvec.lab.problems.mimo.link import (
    channel_matrices,
    check_bits,
    noise_variance,
    quantised,
    symbol_pairs,
    through,
)

_NAMED = 8
_FRESH = 1 << 40
"""So many channels that no two sequences have the same."""


@dataclass(frozen=True)
class MimoEqualisation(Problem):
    """Which symbols were sent, given what was received over an unknown channel.

    The inputs ``xs`` are the received, quantised numbers ``y = Q(H x + n)`` and the outputs ``ys``
    the symbols ``x`` that were sent, four real numbers each. The channel ``H`` is the latent task;
    training draws it from a finite set or, for the true prior, anew for every sequence.

    The errors are squared errors per real number, the paper's unit: predicting 0 has 0.5.

    Attributes:
        n_channels: Channels in the set; None for a fresh one in every sequence.
        snr_db: The signal-to-noise ratio in dB; see ``link.py``.
        bits: The quantiser has ``2^bits`` cells.
        n_points: Pairs in a sequence, the query included.
        seed: Another seed gives other channels.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.mimo import MimoEqualisation
        >>> batch = MimoEqualisation(n_channels=4).sample(2, torch.Generator())
        >>> batch.xs.shape, batch.ys.shape, MimoEqualisation(n_channels=4).tasks
        (torch.Size([2, 20, 4]), torch.Size([2, 20, 4]), ('H1', 'H2', 'H3', 'H4'))
    """

    n_channels: int | None = 8
    snr_db: float = 10.0
    bits: int = 4
    n_points: int = 20
    seed: int = 0

    dim: ClassVar[int] = 4  # type: ignore[misc]
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **QUICK,
            "n_layers": 2,
            "n_heads": 4,
            "d_model": 64,
            "steps": 4_000,
            "n_checkpoints": 20,
        }
    )

    def __post_init__(self) -> None:
        if self.n_channels is not None and not 1 <= self.n_channels < _FRESH:
            raise ValueError(
                f"n_channels is {self.n_channels}; give 1 or more, or None for a fresh channel in "
                "every sequence"
            )
        if self.n_points < 2:
            raise ValueError(f"n_points must be at least 2 (a pair, a query), got {self.n_points}")
        check_bits(self.bits)

    @property
    def tasks(self) -> tuple[str, ...]:
        """``("H1", "H2", ...)``, the first channels of the set, at most 8.

        If every sequence has a fresh channel, these are channels that training does not draw.
        """
        return tuple(f"H{k + 1}" for k in range(min(self._n_drawn, _NAMED)))

    @property
    def n_outputs(self) -> int:
        """Four: the real and imaginary parts of two symbols."""
        return 4

    @property
    def _n_drawn(self) -> int:
        return self.n_channels or _FRESH

    def channels(self, device: torch.device | str = "cpu") -> Complex[Tensor, "channel 2 2"]:
        """The channels of the set, ``[channel, receiving antenna, sending antenna]``.

        Raises:
            ValueError: If every sequence has a fresh one.
        """
        if self.n_channels is None:
            raise ValueError("n_channels is None, so there is no set of channels; give a number")
        return channel_matrices(torch.arange(self.n_channels, device=device), seed=self.seed)

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> Batch:
        """As for :meth:`Problem.sample`, with channels drawn from all of the set.

        A label is the number of a channel, also beyond the first eight, which have names.
        """
        labels = draw_labels(batch_size, self._n_drawn, generator, labels)
        device = generator.device
        shape = (batch_size, self.n_points)
        drawn = torch.randint(16, shape, generator=generator, device=device)
        sent = symbol_pairs(device)[drawn]
        clean = through(self._channels_of(labels), sent)
        noise = math.sqrt(noise_variance(self.snr_db)) * normal(generator, *clean.shape)
        return Batch(quantised(clean + noise, bits=self.bits), sent, labels)

    def _channels_of(self, labels: Int[Tensor, " batch"]) -> Complex[Tensor, "batch 1 2 2"]:
        found = channel_matrices(labels, seed=self.seed)
        return rearrange(found, "batch to source -> batch 1 to source")

    def make_model(self, size: ModelSize, *, seed: int, device: torch.device | str) -> nn.Module:
        """An untrained model whose read-out ``u`` ends in ``(sigmoid(u) - 0.5) sqrt 2``."""
        model: Any = super().make_model(size, seed=seed, device=device)
        model.read_out = nn.Sequential(model.read_out, Bounded())
        untrained: nn.Module = model
        return untrained

    def distance(
        self,
        predictions: Float[Tensor, "*rows output"],
        others: Float[Tensor, "*rows output"],
    ) -> Float[Tensor, "*rows"]:
        """The squared difference, the mean over the four real numbers, as the paper reports it."""
        return (predictions - others).square().mean(-1)

    def right(
        self,
        predictions: Float[Tensor, "*rows output"],
        targets: Float[Tensor, "*rows output"],
        labels: Int[Tensor, "*#rows"],
    ) -> Bool[Tensor, "*rows"]:
        """Whether the nearest pair of symbols is the one that was sent."""
        return ((predictions > 0) == (targets > 0)).all(-1)

    def oracles(self, batch: Batch) -> dict[str, Float[Tensor, "batch point 4"]]:
        """The estimators with known channel, linear, with the finite and with the true prior.

        The first two read the channel from the label. There is a finite prior only if there is a
        finite set; its cost grows with the set.
        """
        link: dict[str, Any] = {"snr_db": self.snr_db, "bits": self.bits}
        channels = channel_matrices(batch.labels, seed=self.seed)
        found = {
            "known channel": known_channel(batch.xs, channels, **link),
            "linear, known channel": linear_mmse(batch.xs, channels, snr_db=self.snr_db),
        }
        if self.n_channels is not None:
            own = self.channels(batch.xs.device)
            found["finite prior"] = finite_prior(batch.xs, batch.ys, own, **link)
        found["true prior"] = true_prior(batch.xs, batch.ys, **link)
        return found

    @property
    def late_from(self) -> int:
        """The last quarter of the points is late: until there the errors still fall."""
        return self.n_points * 3 // 4

    def swapped_at(self, point: int) -> tuple[int, ...]:
        """All tokens before the query: two or three pairs left as they are tell the channel."""
        return tuple(range(2 * point))

    def posterior(self, batch: Batch) -> Float[Tensor, "batch point task"]:
        """As for :meth:`Problem.posterior`; of a set of more than 8, the first 8 channels' share.

        Raises:
            ValueError: If every sequence has a fresh channel.
        """
        own = self.channels(batch.xs.device)
        found = channel_posterior(batch.xs, batch.ys, own, snr_db=self.snr_db, bits=self.bits)
        return found[..., : len(self.tasks)]

    def finding(self, run: Any) -> Finding:
        """As for :meth:`Problem.finding`: does the run remember its channels or infer any?"""
        return finding_of(run)


class Bounded(nn.Module):
    """``(sigmoid(u) - 0.5) sqrt 2``: what the paper makes of the numbers that a model reads out."""

    def forward(self, numbers: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """Numbers between those of the symbols, ``-1 / sqrt 2`` and ``1 / sqrt 2``."""
        return (torch.sigmoid(numbers) - 0.5) * math.sqrt(2)
