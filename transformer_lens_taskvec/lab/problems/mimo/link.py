"""A quantised channel with two antennas at each end (Zecchin, Yu and Simeone 2023).

::

    y = Q(H x + n)      H [2, 2], entries CN(0, 1)      x in {(+-1 +-j) / sqrt 2}^2

``n`` has the variance ``10^(-SNR / 10)`` in each *real* dimension, so that the power of a complex
component is twice that. ``Q`` rounds each real number to the middle of one of ``2^bits`` cells that
divide ``[-4, 4]``, of which the two outer ones reach to infinity. A pair of complex numbers is
written as four real ones, ``re 1, im 1, re 2, im 2``.
"""

from __future__ import annotations

import math

import torch
from einops import einsum, rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor

LIMIT = 4.0
"""The quantiser divides the numbers from minus this to this."""

_INTEGERS = 1 << 24


def symbol_pairs(device: torch.device | str = "cpu") -> Float[Tensor, "symbol 4"]:
    """Return the 16 pairs of QPSK symbols that can be sent, as four real numbers each.

    Args:
        device: Where to put them.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.mimo.link import symbol_pairs
        >>> symbol_pairs().shape, symbol_pairs().square().sum(-1).unique()
        (torch.Size([16, 4]), tensor([2.0000]))
    """
    signs = torch.tensor([-1.0, 1.0], device=device)
    return torch.cartesian_prod(*4 * [signs]) / math.sqrt(2)


def channel_matrices(
    labels: Int[Tensor, " channel"], *, seed: int = 0
) -> Complex[Tensor, "channel 2 2"]:
    """Return channels with independent CN(0, 1) entries, each a function of its label alone.

    A channel is the same in every call, on every device, and whatever other channels there are. So
    a finite set is the first labels of an endless row, and a label drawn from many gives a fresh
    channel.

    Args:
        labels: The channels' numbers, 0 or more.
        seed: Another seed gives another row of channels.

    Returns:
        ``[channel, receiving antenna, sending antenna]``.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.mimo.link import channel_matrices
        >>> few, many = channel_matrices(torch.tensor([3])), channel_matrices(torch.arange(2000))
        >>> bool((few[0] == many[3]).all()), round(float(many.abs().square().mean()), 2)
        (True, 0.97)
    """
    own = int(_hashed(torch.tensor(seed)))
    counters = 8 * rearrange(labels.long(), "channel -> channel 1") + own
    hashed = _hashed(counters + torch.arange(8, device=labels.device))
    uniform = ((hashed & (_INTEGERS - 1)).double() + 0.5) / _INTEGERS
    first, second = rearrange(uniform, "channel (part entry) -> part channel entry", part=2)
    # Box and Muller's map of two uniform numbers to a complex normal one of power 1.
    entries = torch.polar((-first.log()).sqrt(), 2 * math.pi * second)
    ordered = rearrange(entries, "channel (to source) -> channel to source", to=2)
    return ordered.to(torch.complex64)


def through(
    channels: Complex[Tensor, "*#rows 2 2"], sent: Float[Tensor, "*#rows 4"]
) -> Float[Tensor, "*rows 4"]:
    """Return ``H x``, without noise, in the shape and precision of ``sent``.

    Args:
        channels: ``[..., receiving antenna, sending antenna]``.
        sent: ``[..., 4]``.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.mimo.link import through
        >>> through(torch.tensor([[0, 1j], [1, 0]]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([-4.,  3.,  1.,  2.])
    """
    pairs = as_complex(sent)
    arrived = einsum(channels.to(pairs.dtype), pairs, "... to source, ... source -> ... to")
    return as_real(arrived)


def quantised(numbers: Float[Tensor, "*rows"], *, bits: int) -> Float[Tensor, "*rows"]:
    """Return the middle of each number's cell; numbers beyond the limits are in the outer ones.

    Args:
        numbers: Real numbers of any shape.
        bits: The quantiser has ``2^bits`` cells.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.mimo.link import quantised
        >>> quantised(torch.tensor([-9.0, 0.1, 0.6]), bits=4)
        tensor([-3.7500,  0.2500,  0.7500])
    """
    return (cells_of(numbers, bits) + 0.5).to(numbers.dtype) * cell_width(bits) - LIMIT


def cell_width(bits: int) -> float:
    """Return the width of a cell of the quantiser."""
    return 2 * LIMIT / (1 << bits)


def noise_variance(snr_db: float) -> float:
    """Return the variance of the noise in a real dimension; in a complex one it is twice that."""
    return float(10 ** (-snr_db / 10))


def cell_log_probabilities(
    received: Float[Tensor, "*#rows"],
    means: Float[Tensor, "*#rows"],
    *,
    snr_db: float,
    bits: int,
) -> Float[Tensor, "*rows"]:
    """Return ``log P(received | mean)`` of real numbers, exact also far in the tails.

    Args:
        received: Quantised numbers.
        means: What they would be without noise and quantiser.
        snr_db: The signal-to-noise ratio.
        bits: Of the quantiser.

    Returns:
        Float64; the shapes are broadcast.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.mimo.link import cell_log_probabilities
        >>> cells = quantised(torch.arange(-4, 4, 0.5) + 0.1, bits=4)
        >>> found = cell_log_probabilities(cells, torch.tensor(3.9), snr_db=10, bits=4)
        >>> float(found.exp().sum()), round(float(found[0]))
        (1.0, -278)
    """
    sigma, width, last = math.sqrt(noise_variance(snr_db)), cell_width(bits), 2**bits - 1
    cells = cells_of(received, bits)
    lower = cells * width - LIMIT
    upper = torch.where(cells == last, torch.inf, lower + width)
    lower = torch.where(cells == 0, -torch.inf, lower)
    low, high = (lower - means.double()) / sigma, (upper - means.double()) / sigma
    right = low + high > 0  # mirrored to the left, where Phi keeps its relative precision
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    log_high = torch.special.log_ndtr(high)
    found: Tensor = log_high + (-torch.expm1(torch.special.log_ndtr(low) - log_high)).log()
    return found


def as_complex(pairs: Float[Tensor, "*rows 4"]) -> Complex[Tensor, "*rows 2"]:
    """Return real numbers ``re 1, im 1, re 2, im 2`` as two complex ones."""
    split = rearrange(pairs, "... (antenna part) -> ... antenna part", part=2)
    return torch.view_as_complex(split.contiguous())


def as_real(pairs: Complex[Tensor, "*rows 2"]) -> Float[Tensor, "*rows 4"]:
    """Return two complex numbers as real ones, ``re 1, im 1, re 2, im 2``."""
    return rearrange(torch.view_as_real(pairs), "... antenna part -> ... (antenna part)")


def cells_of(numbers: Float[Tensor, "*rows"], bits: int) -> Int[Tensor, "*rows"]:
    """The index of each number's cell, from the lowest."""
    cells = ((numbers.double() + LIMIT) / cell_width(bits)).floor()
    return cells.clamp(0, 2**bits - 1).long()


def check_bits(bits: int) -> None:
    """Raise a ValueError unless the quantiser can be made."""
    if not 1 <= bits <= 12:
        raise ValueError(f"bits is {bits}; the quantiser takes 1 to 12")


def _hashed(counters: Int[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
    """Well-mixed 64 bits of each counter (the finaliser of Steele et al. 2014, SplitMix64)."""

    def mixed(bits: Tensor, by: int) -> Tensor:
        return bits ^ (bits >> by) & ((1 << (64 - by)) - 1)  # a shift without the sign

    bits = mixed(counters - 0x61C8864680B583EB, 30) * -0x40A7B892E31B1A47
    bits = mixed(bits, 27) * -0x6B2FB644ECCEEE15
    return mixed(bits, 31)
