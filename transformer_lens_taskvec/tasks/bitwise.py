"""Bitwise tasks: a logical operation on a pair of binary numbers, written out as digits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from transformer_lens_taskvec.tasks.base import NULL, Example, Task, by_name, check_sample_size

_MAX_BITS = 16
# Each operation on two integers and the mask of n ones.
_OPERATIONS: dict[str, Callable[[int, int, int], int]] = {
    "AND": lambda a, b, ones: a & b,
    "NAND": lambda a, b, ones: ones ^ (a & b),
    "OR": lambda a, b, ones: a | b,
    "NOR": lambda a, b, ones: ones ^ (a | b),
    "XOR": lambda a, b, ones: a ^ b,
    "XNOR": lambda a, b, ones: ones ^ a ^ b,
}
BITWISE = tuple(_OPERATIONS)
"""The names of the tasks of :func:`bitwise_tasks`, except Null."""


@dataclass(frozen=True)
class BitwiseTask:
    """A bitwise operation on two ``n_bits``-digit binary numbers; see :func:`bitwise_tasks`.

    Args:
        name: The operation, one of AND, NAND, OR, NOR, XOR, XNOR, or Null for random digits.
        n_bits: The number of binary digits of each number and of the answer, 1 to 16.

    Raises:
        ValueError: If the operation is unknown or ``n_bits`` is out of range.
    """

    name: str
    n_bits: int = 5

    def __post_init__(self) -> None:
        if self.name != NULL and self.name not in _OPERATIONS:
            known = ", ".join((*_OPERATIONS, NULL))
            raise ValueError(f"unknown bitwise operation {self.name!r}; use one of {known}")
        if not 1 <= self.n_bits <= _MAX_BITS:
            raise ValueError(f"n_bits={self.n_bits} is out of range; use 1 to {_MAX_BITS} bits")

    def __len__(self) -> int:
        return 1 << 2 * self.n_bits

    def sample(self, n: int, rng: random.Random) -> list[Example]:
        """Return ``n`` random examples, whose ``x`` is two numbers separated by a space.

        Raises:
            ValueError: If ``n`` is negative or more than the ``4**n_bits`` pairs of numbers.
        """
        check_sample_size(self.name, n, len(self))
        # A pair is one number of 2 * n_bits digits, so the pairs need not be listed.
        return [self._example(pair, rng) for pair in rng.sample(range(len(self)), n)]

    def _example(self, pair: int, rng: random.Random) -> Example:
        ones = (1 << self.n_bits) - 1
        a, b = pair >> self.n_bits, pair & ones
        if self.name == NULL:
            result = rng.getrandbits(self.n_bits)
        else:
            result = _OPERATIONS[self.name](a, b, ones)
        return Example(f"{self._digits(a)} {self._digits(b)}", self._digits(result))

    def _digits(self, number: int) -> str:
        return f"{number:0{self.n_bits}b}"


def bitwise_tasks(n_bits: int = 5, null: bool = True) -> dict[str, Task]:
    """Return the bitwise-arithmetic tasks (Han et al. 2025, §4): operations on binary numbers.

    Args:
        n_bits: The number of binary digits, 1 to 16; the paper uses 5.
        null: Whether to add Null, the task whose answer is random digits.

    Returns:
        The tasks AND, NAND, OR, NOR, XOR, XNOR and Null by name, in that order.

    Raises:
        ValueError: If ``n_bits`` is out of range.

    Example:
        >>> import random
        >>> import transformer_lens_taskvec as tv
        >>> tasks = tv.bitwise_tasks()
        >>> list(tasks)
        ['AND', 'NAND', 'OR', 'NOR', 'XOR', 'XNOR', 'Null']
        >>> tasks["XOR"].sample(1, random.Random(1))
        [Example(x='01000 10011', y='11011')]
    """
    names = (*BITWISE, NULL) if null else BITWISE
    return by_name([BitwiseTask(name, n_bits) for name in names])
