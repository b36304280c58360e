"""Chains of variables as rows of tokens: drawing them, reading them back, evaluating them.

A chain is ``a = 1, b = a, c = not b, ...``. Its clauses are written in a random order, each as
three tokens: what the variable is made from, ``is`` or ``not``, and the variable. The variable is
last, so that a causal model has read the whole clause at its token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

IS, NOT = 2, 3
"""The tokens of a clause's operation; tokens 0 and 1 are the values."""

FIRST_LETTER = 4
"""The token of the first letter."""

CLAUSE = 3
"""Tokens in a clause."""


@dataclass(frozen=True)
class Chains:
    """What rows of tokens say, in the order of their chains.

    Attributes:
        letters: The token of each variable, ``[batch, position]``.
        values: The value of each variable, 0 or 1, ``[batch, position]``.
        negated: Whether the clause of a variable holds ``not``, ``[batch, position]``; the first
            never does.
        clause_at: The place of the variable's token in its clause, ``[batch, position]``.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.lego.chains import read_chains
        >>> tokens = torch.tensor([[6, 3, 4, 1, 2, 6]])  # c not a, 1 is c
        >>> chains = read_chains(tokens, n_vars=2)
        >>> chains.letters.tolist(), chains.values.tolist(), chains.clause_at.tolist()
        ([[6, 4]], [[1, 0]], [[5, 2]])
    """

    letters: Int[Tensor, "batch position"]
    values: Int[Tensor, "batch position"]
    negated: Bool[Tensor, "batch position"]
    clause_at: Int[Tensor, "batch position"]


def read_chains(tokens: Int[Tensor, "batch token"], n_vars: int) -> Chains:
    """Follow the chain of every row, clause by clause, from its value.

    Args:
        tokens: Rows that begin with the clauses, ``[batch, token]``; what follows is not read.
        n_vars: Clauses in a row.

    Returns:
        Letters, values, negations and places, ``[batch, position]`` each.

    Raises:
        ValueError: If the rows are shorter than the clauses, or are no chains.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.lego.chains import read_chains
        >>> read_chains(torch.tensor([[0, 2, 9, 9, 3, 5]]), n_vars=2).values.tolist()
        [[0, 1]]
    """
    if tokens.shape[1] < CLAUSE * n_vars:
        raise ValueError(
            f"tokens has {tokens.shape[1]} a row; {n_vars} clauses take {CLAUSE * n_vars}"
        )
    clauses = tokens[:, : CLAUSE * n_vars]
    sources, operations, targets = rearrange(
        clauses, "batch (clause part) -> part batch clause", part=CLAUSE
    )
    is_first = sources < IS
    if bool((is_first.sum(1) != 1).any()):
        raise ValueError("tokens must hold one clause with a value, 0 or 1, in each row")
    rows = torch.arange(len(tokens), device=tokens.device)
    at = is_first.int().argmax(1)
    value = sources[rows, at]
    found: list[tuple[Tensor, ...]] = []
    for position in range(n_vars):
        negated = operations[rows, at] == NOT
        value = value ^ negated.long()
        letter = targets[rows, at]
        found.append((letter, value, negated, CLAUSE * at + CLAUSE - 1))
        follows = sources == letter[:, None]
        if position + 1 < n_vars and not bool(follows.any(1).all()):
            raise ValueError(
                f"tokens hold a chain that ends after {position + 1} of {n_vars} clauses"
            )
        at = follows.int().argmax(1)
    letters, values, negations, places = (torch.stack(part, 1) for part in zip(*found, strict=True))
    return Chains(letters, values, negations, places)


def draw_chains(
    first: Int[Tensor, " batch"],
    negated: Bool[Tensor, "batch step"],
    n_letters: int,
    generator: torch.Generator,
) -> tuple[Int[Tensor, "batch token"], Int[Tensor, "batch position"]]:
    """Write chains with random letters and their clauses in random order.

    Args:
        first: The value of the first variable, ``[batch]``.
        negated: Whether each further variable is the negation of the one before it,
            ``[batch, n_vars - 1]``.
        n_letters: Letters to choose from.
        generator: Source of randomness, on the device of ``first``.

    Returns:
        The clauses' tokens, ``[batch, 3 * n_vars]``, and the letters in the order of the chain.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.lego.chains import draw_chains, read_chains
        >>> first, negated = torch.tensor([1]), torch.tensor([[True, False]])
        >>> tokens, _ = draw_chains(first, negated, 26, torch.Generator().manual_seed(0))
        >>> read_chains(tokens, n_vars=3).values.tolist()
        [[1, 0, 0]]
    """
    batch, n_vars = len(first), negated.shape[1] + 1
    letters = FIRST_LETTER + _shuffled(batch, n_letters, generator)[:, :n_vars]
    sources = torch.cat([first[:, None], letters[:, :-1]], 1)
    operations = torch.cat([torch.full_like(first[:, None], IS), IS + negated.long()], 1)
    clauses = torch.stack([sources, operations, letters], -1)
    order = _shuffled(batch, n_vars, generator)
    clauses = clauses.gather(1, order[..., None].expand_as(clauses))
    return rearrange(clauses, "batch clause part -> batch (clause part)"), letters


def shuffled_letters(
    letters: Int[Tensor, "batch position"], generator: torch.Generator
) -> Int[Tensor, "batch position"]:
    """The letters of each row in a random order."""
    batch, n_vars = letters.shape
    return letters.gather(1, _shuffled(batch, n_vars, generator))


def query_places(tokens: Int[Tensor, "batch token"], n_vars: int) -> Int[Tensor, "batch position"]:
    """The place of each variable's query, in the order of the chain.

    Args:
        tokens: Rows of clauses, followed by a query of every variable, ``[batch, token]``.
        n_vars: Clauses in a row.

    Raises:
        ValueError: If the rows are no chains, or a variable is not asked for.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.lego.chains import query_places
        >>> query_places(torch.tensor([[6, 3, 4, 1, 2, 6, 4, 6]]), n_vars=2).tolist()
        [[7, 6]]
    """
    letters, begin = read_chains(tokens, n_vars).letters, CLAUSE * n_vars
    asked = tokens[:, None, begin:] == letters[:, :, None]
    if not bool(asked.any(-1).all()):
        raise ValueError("tokens must ask for every variable after the clauses")
    return begin + asked.int().argmax(-1)


def clause_ceiling(n_vars: int) -> Float[Tensor, " position"]:
    """The best accuracy for each variable's value at the token of its clause, ``[n_vars]``.

    There a causal model can know the value only if the clauses of all variables before it in the
    chain came first: with probability ``1 / i`` at position ``i`` from 1. In any other case the
    value is a coin.

    Args:
        n_vars: Variables in a chain.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.lego.chains import clause_ceiling
        >>> [round(value, 3) for value in clause_ceiling(4).tolist()]
        [1.0, 0.75, 0.667, 0.625]
    """
    return (1 + 1 / torch.arange(1, n_vars + 1)) / 2


def even_chance(n_steps: int) -> Float[Tensor, "position count"]:
    """How likely an even number of the first steps negate, given how many of all steps do.

    The steps that negate are a random choice of all, so that their number among the first is
    hypergeometric. It is what a predictor knows that counts the ``not``s and follows no clause: all
    about the last variable, nothing about most others.

    Args:
        n_steps: Steps of the chain, one fewer than variables.

    Returns:
        ``[n_steps + 1, n_steps + 1]``: by position in the chain and number of ``not``s.

    Example:
        >>> from transformer_lens_taskvec.lab.problems.lego.chains import even_chance
        >>> even_chance(2).tolist()
        [[1.0, 1.0, 1.0], [1.0, 0.5, 0.0], [1.0, 0.0, 1.0]]
    """
    from scipy.stats import hypergeom  # takes half a second to import

    evens = torch.arange(0, n_steps + 1, 2).numpy()
    table = [
        [
            float(hypergeom.pmf(evens, n_steps, count, position).sum())
            for count in range(n_steps + 1)
        ]
        for position in range(n_steps + 1)
    ]
    return torch.tensor(table).clamp(0, 1)


def _shuffled(batch: int, n: int, generator: torch.Generator) -> Int[Tensor, "batch n"]:
    """A permutation of ``0, ..., n - 1`` for each row."""
    return torch.rand(batch, n, generator=generator, device=generator.device).argsort(1)
