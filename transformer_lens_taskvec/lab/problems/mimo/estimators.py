"""What was sent over the channel of ``link.py``, estimated with what is known of it.

Every estimator but the linear one is a mean over the 16 pairs of symbols, with the exact
probability of each cell of the quantiser, ``Phi((upper - m) / sigma) - Phi((lower - m) / sigma)``.
They differ in what they know about ``H``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.quasirandom import SobolEngine

from transformer_lens_taskvec.lab.problems.mimo.link import (
    LIMIT,
    as_complex,
    cell_log_probabilities,
    cell_width,
    cells_of,
    check_bits,
    noise_variance,
    symbol_pairs,
    through,
)

_AT_ONCE = 250_000
"""About how many log-probabilities are computed at once, so that they stay in the cache."""


def known_channel(
    received: Float[Tensor, "batch point 4"],
    channels: Complex[Tensor, "batch 2 2"],
    *,
    snr_db: float,
    bits: int,
) -> Float[Tensor, "batch point 4"]:
    """Return ``E[x | y, H]``: the optimum if the channel is known.

    Args:
        received: ``[batch, point, 4]``.
        channels: Of each sequence, ``[batch, receiving antenna, sending antenna]``.
        snr_db: The signal-to-noise ratio.
        bits: Of the quantiser.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.mimo import known_channel
        >>> received, identity = torch.full((1, 1, 4), 0.75), torch.eye(2)[None].to(torch.complex64)
        >>> known_channel(received, identity, snr_db=10, bits=4)[0, 0, 0]
        tensor(0.7069)
    """
    _check(received, received, bits)
    symbols = symbol_pairs(received.device).double()
    means = through(rearrange(channels, "batch to source -> batch 1 1 to source"), symbols)
    pairs = rearrange(received, "batch point real -> batch point 1 real")
    logs = cell_log_probabilities(pairs, means, snr_db=snr_db, bits=bits).sum(-1)
    return _mean(logs.softmax(-1)).to(received.dtype)


def linear_mmse(
    received: Float[Tensor, "batch point 4"],
    channels: Complex[Tensor, "batch 2 2"],
    *,
    snr_db: float,
) -> Float[Tensor, "batch point 4"]:
    """Return ``(H^H H + 2 sigma^2 I)^-1 H^H y``: the best linear estimate if the channel is known.

    A complex component of ``x`` has power 1, and one of the noise has ``2 sigma^2``, where
    ``sigma^2`` is the variance in a real dimension. With covariances ``C_xy = H^H`` and
    ``C_yy = H H^H + 2 sigma^2 I``, the estimate ``C_xy C_yy^-1 y`` is the one above. The quantiser
    is left out of the model of ``y``, as in the paper.

    Args:
        received: ``[batch, point, 4]``.
        channels: Of each sequence, ``[batch, receiving antenna, sending antenna]``.
        snr_db: The signal-to-noise ratio.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.mimo import linear_mmse
        >>> identity = torch.eye(2)[None].to(torch.complex64)
        >>> linear_mmse(torch.full((1, 1, 4), 1.2), identity, snr_db=10)[0, 0]
        tensor([1., 1., 1., 1.])
    """
    _check(received, received)
    wide, adjoint = channels.to(torch.complex128), channels.to(torch.complex128).mH
    power = 2 * noise_variance(snr_db) * torch.eye(2, dtype=wide.dtype, device=wide.device)
    equaliser = torch.linalg.solve(adjoint @ wide + power, adjoint)
    by_point = rearrange(equaliser, "batch source to -> batch 1 source to")
    return through(by_point, received.double()).to(received.dtype)


def channel_posterior(
    received: Float[Tensor, "batch point 4"],
    sent: Float[Tensor, "batch point 4"],
    channels: Complex[Tensor, "channel 2 2"],
    *,
    snr_db: float,
    bits: int,
) -> Float[Tensor, "batch point channel"]:
    """Return ``P(channel | pairs before the point)`` if it is one of a finite set.

    Args:
        received: ``[batch, point, 4]``.
        sent: ``[batch, point, 4]``.
        channels: The set, ``[channel, receiving antenna, sending antenna]``, all equally likely.
        snr_db: The signal-to-noise ratio.
        bits: Of the quantiser.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.mimo import channel_posterior
        >>> from transformer_lens_taskvec.lab.problems.mimo.link import *
        >>> channels = channel_matrices(torch.arange(3))
        >>> sent = symbol_pairs()[None]
        >>> received = quantised(through(channels[2], sent), bits=4)
        >>> channel_posterior(received, sent, channels, snr_db=10, bits=4)[0, [0, 15], 2]
        tensor([0.3333, 1.0000])
    """
    _check(received, sent, bits)
    table = _table(channels, snr_db, bits)
    logs = _evidence(table, cells_of(received, bits), _indices(sent))
    return logs.softmax(-1).to(received.dtype)


def finite_prior(
    received: Float[Tensor, "batch point 4"],
    sent: Float[Tensor, "batch point 4"],
    channels: Complex[Tensor, "channel 2 2"],
    *,
    snr_db: float,
    bits: int,
    query_informs: bool = True,
    points: Sequence[int] | None = None,
) -> Float[Tensor, "batch chosen 4"]:
    """Return ``E[x | y, pairs before]`` if the channel is one of a finite set.

    With fresh channels of the true prior this is its plain Monte-Carlo estimate, which is biased:
    after many pairs a few of the channels have all the weight, and none of them is right. The
    paper's values, .41 for 128 channels and .36 for 256 on fresh ones after 19 pairs, are those of
    a table of Phi that ends at 3 sigma; with exact probabilities they are .35 and .30.

    Args:
        received: ``[batch, point, 4]``.
        sent: ``[batch, point, 4]``; of a point, only what was sent before it is read.
        channels: The set, ``[channel, receiving antenna, sending antenna]``, all equally likely.
        snr_db: The signal-to-noise ratio.
        bits: Of the quantiser.
        query_informs: Whether the query's ``y`` tells about the channel too, as it does exactly.
            The paper's estimator, ``sum_m P(m | pairs before) E[x | y, m]``, takes the channel
            from the pairs alone.
        points: The points to predict; by default all.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.mimo import finite_prior
        >>> from transformer_lens_taskvec.lab.problems.mimo.link import *
        >>> channels = channel_matrices(torch.arange(3))
        >>> sent = symbol_pairs()[None]
        >>> received = quantised(through(channels[2], sent), bits=4)
        >>> found = finite_prior(received, sent, channels, snr_db=10, bits=4)
        >>> bool((found[:, 8:] * sent[:, 8:] > 0).all())
        True
    """
    _check(received, sent, bits)
    chosen = _chosen(points, received)
    table = _table(channels, snr_db, bits)
    n_rows = max(1, _AT_ONCE // table[0, 0].numel())
    found = []
    for some, before in zip(received.split(n_rows), sent.split(n_rows), strict=True):
        cells = cells_of(some, bits)
        priors = _evidence(table, cells, _indices(before)).log_softmax(-1)
        shares = []
        for point in chosen:
            prior = rearrange(priors[:, point], "row channel -> row 1 channel")
            logs = _summed([table[real, cells[:, point, real]] for real in range(4)])
            if query_informs:
                shares.append((prior + logs).logsumexp(-1).softmax(-1))
            else:
                shares.append((prior.exp() * logs.softmax(1)).sum(-1))
        found.append(torch.stack(shares, dim=1))
    return _mean(torch.cat(found)).to(received.dtype)


def true_prior(
    received: Float[Tensor, "batch point 4"],
    sent: Float[Tensor, "batch point 4"],
    *,
    snr_db: float,
    bits: int,
    n_samples: int = 16,
    points: Sequence[int] | None = None,
    seed: int = 0,
) -> Float[Tensor, "batch chosen 4"]:
    """Return ``E[x | y, pairs before]`` if the channel's entries are CN(0, 1), by importance.

    The rows of ``H``, one for each receiving antenna, are independent, also given the pairs. So the
    likelihood of a symbol pair is a product over antennas of integrals over the two entries ``h``
    of a row::

        P(s | y, pairs)  ~  prod_a  E_{h | pairs of a}[ P(y_a | s, h) ]

    Each is a weighted mean over samples of ``h`` from the posterior that a linear channel with
    Gaussian noise of variance ``sigma^2 + width^2 / 12`` would have: the regularised least-squares
    estimate and its covariance. The weights are exact. With 19 pairs, plain Monte Carlo needs more
    than 10^5 channels and is still biased; here 16 samples do.

    Args:
        received: ``[batch, point, 4]``.
        sent: ``[batch, point, 4]``; of a point, only what was sent before it is read.
        snr_db: The signal-to-noise ratio.
        bits: Of the quantiser.
        n_samples: Samples of a row, an even number: each comes with its mirror image.
        points: The points to predict; by default all.
        seed: Seed of the samples.

    Raises:
        ValueError: If the shapes do not match, or ``n_samples`` is not even.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.mimo import true_prior
        >>> from transformer_lens_taskvec.lab.problems.mimo.link import *
        >>> sent = symbol_pairs()[None]
        >>> received = quantised(through(channel_matrices(torch.tensor([0])), sent), bits=4)
        >>> found = true_prior(received, sent, snr_db=10, bits=4)
        >>> bool((found[:, 8:] * sent[:, 8:] > 0).all())
        True
    """
    _check(received, sent, bits)
    if n_samples < 2 or n_samples % 2:
        raise ValueError(f"n_samples is {n_samples}; ask for an even number, 2 or more")
    chosen = _chosen(points, received)
    normals = _complex_normals(n_samples, seed, received.device)
    n_rows = max(1, _AT_ONCE // (4 * n_samples * max(16, received.shape[1])))
    found = []
    for some, before in zip(received.split(n_rows), sent.split(n_rows), strict=True):
        link = _Pairs(some.double(), before.double(), snr_db, bits)
        shares = [link.symbol_shares(point, normals) for point in chosen]
        found.append(torch.stack(shares, dim=1))
    return _mean(torch.cat(found)).to(received.dtype)


@dataclass(frozen=True)
class _Pairs:
    """Sequences of pairs, whose channels are to be sampled from their posterior."""

    received: Float[Tensor, "row point 4"]
    sent: Float[Tensor, "row point 4"]
    snr_db: float
    bits: int

    def symbol_shares(
        self, point: int, normals: Complex[Tensor, "sample 2"]
    ) -> Float[Tensor, "row 16"]:
        """``P(symbol pair | y, pairs before)`` of a point, up to a factor of its row."""
        entries, weights = self._sampled(point, normals)
        symbols = as_complex(symbol_pairs(self.sent.device).double())
        logs = self._log_likelihood(entries, symbols, self.received[:, point, None])
        by_antenna = (logs + weights[..., None]).logsumexp(2)
        return by_antenna.sum(1).softmax(-1)

    def _sampled(
        self, point: int, normals: Complex[Tensor, "sample 2"]
    ) -> tuple[Complex[Tensor, "row antenna sample 2"], Float[Tensor, "row antenna sample"]]:
        """Samples of each antenna's row of the channel, and their log-weights."""
        x, y = as_complex(self.sent[:, :point]), as_complex(self.received[:, :point])
        power = 2 * (noise_variance(self.snr_db) + cell_width(self.bits) ** 2 / 12)
        precision = torch.eye(2, dtype=x.dtype, device=x.device) + x.mH @ x / power
        moment = x.mH @ y / power
        factor = torch.linalg.cholesky(precision)
        estimate = torch.cholesky_solve(moment, factor).mT[:, :, None]
        spread = torch.linalg.solve_triangular(factor.mH, normals.mT, upper=True).mT[:, None]
        entries = estimate + spread
        observed = rearrange(self.received[:, :point], "row pair real -> row pair real")
        fit = self._log_likelihood(entries, x[:, None], observed).sum(-1)
        weights = fit - _power(entries) + _power(normals)
        return entries, weights.log_softmax(-1)

    def _log_likelihood(
        self,
        entries: Complex[Tensor, "row antenna sample 2"],
        sent: Complex[Tensor, "*same pair 2"],
        received: Float[Tensor, "row pair_or_one 4"],
    ) -> Float[Tensor, "row antenna sample pair"]:
        """``log P(received | sent, entries)`` of each antenna's complex number."""
        arrived = entries @ sent.mT
        numbers = rearrange(received, "row pair (antenna part) -> row antenna 1 pair part", part=2)
        means = torch.view_as_real(arrived)
        logs = cell_log_probabilities(numbers, means, snr_db=self.snr_db, bits=self.bits)
        return logs.sum(-1)


def _indices(sent: Float[Tensor, "*rows 4"]) -> Int[Tensor, "*rows"]:
    """Where each pair stands in :func:`symbol_pairs`."""
    places = torch.tensor([8, 4, 2, 1], device=sent.device)
    return ((sent > 0) * places).sum(-1)


def _mean(shares: Float[Tensor, "*rows 16"]) -> Float[Tensor, "*rows 4"]:
    """The mean over the pairs of symbols."""
    return shares @ symbol_pairs(shares.device).to(shares.dtype)


def _table(
    channels: Complex[Tensor, "channel 2 2"], snr_db: float, bits: int
) -> Float[Tensor, "real cell symbol channel"]:
    """``log P(cell | symbol pair, channel)`` of each of the four real numbers received."""
    symbols = symbol_pairs(channels.device).double()
    means = through(rearrange(channels, "channel to source -> channel 1 to source"), symbols)
    middles = (torch.arange(2**bits, device=channels.device) + 0.5) * cell_width(bits) - LIMIT
    return cell_log_probabilities(
        rearrange(middles, "cell -> cell 1 1"),
        rearrange(means, "channel symbol real -> real 1 symbol channel"),
        snr_db=snr_db,
        bits=bits,
    )


def _evidence(
    table: Float[Tensor, "real cell symbol channel"],
    cells: Int[Tensor, "row point real"],
    symbols: Int[Tensor, "row point"],
) -> Float[Tensor, "row point channel"]:
    """``log P(pairs before the point | channel)``."""
    logs = _summed([table[real, cells[..., real], symbols] for real in range(4)])
    before = logs[:, :-1].cumsum(1)
    return torch.cat([torch.zeros_like(logs[:, :1]), before], dim=1)


def _complex_normals(
    n_samples: int, seed: int, device: torch.device
) -> Complex[Tensor, "sample 2"]:
    """Well-spread complex normal pairs and their mirror images, in double precision."""
    even = SobolEngine(4, scramble=True, seed=seed).draw(n_samples // 2, dtype=torch.float64)
    normals = torch.special.ndtri(even.clamp(1e-9, 1 - 1e-9)) / math.sqrt(2)
    return as_complex(torch.cat([normals, -normals]).to(device))


def _power(pairs: Complex[Tensor, "*rows 2"]) -> Float[Tensor, "*rows"]:
    return pairs.abs().square().sum(-1)


def _summed(terms: Sequence[Float[Tensor, "*rows"]]) -> Float[Tensor, "*rows"]:
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def _chosen(points: Sequence[int] | None, received: Float[Tensor, "batch point 4"]) -> list[int]:
    n_points = received.shape[1]
    chosen = list(range(n_points)) if points is None else [int(point) for point in points]
    if not chosen or not all(0 <= point < n_points for point in chosen):
        raise ValueError(
            f"points is {chosen}; give one or more of 0 to {n_points - 1}, the points of received"
        )
    return chosen


def _check(
    received: Float[Tensor, "batch point 4"], sent: Float[Tensor, "batch point 4"], bits: int = 1
) -> None:
    if received.ndim != 3 or received.shape[2] != 4 or sent.shape != received.shape:
        raise ValueError(
            "received and sent must be [batch, point, 4]; got "
            f"{list(received.shape)} and {list(sent.shape)}"
        )
    check_bits(bits)
