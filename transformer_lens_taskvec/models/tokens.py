"""Prompts as padded batches of tokens.

Prompts and answers are tokenised separately and without special tokens, so that no token spans the
boundary between them. Where a tokenizer marks the beginning of a text (Llama 2's puts a space
there), an answer is tokenised as what continues a text. A beginning-of-sequence token (BOS)
precedes a prompt if its template says so. Batches are left-padded: the last prompt token of each
row is at index -1.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Separator:
    """The last token before the output of one of an episode's examples, as a position.

    :func:`evaluate`, :func:`evaluate_many` and :func:`generate` find it in each episode; a bare
    hook cannot, and texts without examples have none.

    Attributes:
        index: The example: 0 is the first demonstration, -1 the query, whose separator is the last
            token of the prompt.

    Example:
        >>> import torch
        >>> import transformer_lens_taskvec as tv
        >>> tv.inject(torch.ones(4), 2, position=tv.interventions.Separator(0))
        Intervention(blocks.2.hook_resid_post, replace, |v|=2, position=Separator(0))
    """

    index: int

    def __repr__(self) -> str:
        return f"Separator({self.index})"


@dataclass(frozen=True)
class Each:
    """A position of its own in each of several prompts, counted from its end."""

    from_end: tuple[int, ...]


Position = int | tuple[int, ...] | Separator | Each | None
"""One or several positions of a prompt, negative ones from its end; None for every position."""


def as_position(position: Any) -> Position:
    """Return positions as an int, a tuple of ints, a separator, or None.

    Raises:
        ValueError: If they are none of these.

    Example:
        >>> as_position([0, -1]), as_position(None)
        ((0, -1), None)
    """
    if isinstance(position, Separator | Each):
        return position
    several = isinstance(position, Sequence) and not isinstance(position, str)
    found = tuple(position) if several else (position,)
    whole = all(isinstance(one, Integral) and not isinstance(one, bool) for one in found)
    if position is not None and (not whole or not found):
        raise ValueError(
            f"position is {position!r}; it must be a whole number, such as -1 for the last token "
            "of the prompt, or several of them, a Separator, or None for all positions"
        )
    return None if position is None else tuple(map(int, found)) if several else int(found[0])


@dataclass(frozen=True)
class PromptBatch:
    """Left-padded prompts.

    Attributes:
        tokens: ``[row, pos]`` token ids, or ``[row, pos, dim]`` vectors.
        mask: ``[row, pos]``, True where a token is real.
        rows: The index of each row's prompt in the list that was batched.
        lengths: The number of real tokens of each row, known without asking the device.
    """

    tokens: Int[Tensor, "row pos"] | Float[Tensor, "row pos dim"]
    mask: Bool[Tensor, "row pos"]
    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def padding(self) -> Bool[Tensor, "row pos"] | None:
        """The mask, or None if every token is real."""
        return None if min(self.lengths) == self.tokens.shape[1] else self.mask

    def columns(self, position: Position) -> Int[Tensor, "row at"]:
        """Return the columns of positions of the prompts, as :func:`row_indices`."""
        width = self.tokens.shape[1]
        if isinstance(position, Each):
            found = torch.tensor([[width + position.from_end[row]] for row in self.rows])
        else:
            found = row_indices(position, self.lengths, width)
        return found.to(self.tokens.device)

    def part(self, start: int, end: int) -> PromptBatch:
        """Return the rows from ``start`` to ``end``."""
        some = slice(start, end)
        return PromptBatch(self.tokens[some], self.mask[some], self.rows[some], self.lengths[some])

    def before_last(self) -> PromptBatch:
        """Return the prompts without their last tokens."""
        shorter = tuple(length - 1 for length in self.lengths)
        return PromptBatch(self.tokens[:, :-1], self.mask[:, :-1], self.rows, shorter)

    def to(self, device: torch.device) -> PromptBatch:
        """Return the batch on another device."""
        return PromptBatch(self.tokens.to(device), self.mask.to(device), self.rows, self.lengths)


Tokens = Sequence[int] | Shaped[Tensor, "pos ..."]
"""A prompt as the model reads it: token ids, or a tensor of vectors or ids for one of the lab."""


def encode(model: Any, prompts: Sequence[str | Tensor], *, bos: bool | None = None) -> list[Any]:
    """Return the token ids of each text, with or without a BOS; vectors are returned unchanged.

    Args:
        model: The model with the tokenizer.
        prompts: Texts, or vectors ``[pos, dim]`` for a model of the lab.
        bos: Whether a BOS precedes each text; None for :func:`bos_habit`.

    Raises:
        ValueError: If the model has no tokenizer, a BOS is asked for and the tokenizer has none, a
            text has no tokens, or texts and vectors are mixed.
    """
    vectors = [prompt for prompt in prompts if isinstance(prompt, Tensor)]
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if vectors and (texts or bos):
        raise ValueError("prompts of vectors take no BOS, and cannot be mixed with texts")
    if vectors:
        return vectors
    prefix: list[int] = []
    if bos_habit(model) if bos is None else bos:
        token = token_id(model, "bos")
        if token is None:
            raise ValueError("the template has bos=True, but the model's tokenizer has no BOS")
        prefix = [token]
    encoded = [prefix + ids for ids in _token_ids(_tokenizer(model), texts)]
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise ValueError(f"the prompt {text!r} has no tokens; give it at least one")
    return encoded


def encode_prompts(model: Any, episodes: Sequence[Any]) -> tuple[list[Any], bool]:
    """Return the token ids of each episode's prompt, and whether they start with a BOS.

    Raises:
        ValueError: As for :func:`encode` and :func:`bos_of`.
    """
    bos = bos_of(model, episodes)
    return encode(model, [episode.prompt for episode in episodes], bos=bos), bos


def bos_of(model: Any, episodes: Sequence[Any]) -> bool:
    """Return whether a BOS stands before the prompts of episodes, by their templates.

    Raises:
        ValueError: If some of them ask for a BOS and others for none, or as for :func:`bos_habit`.
    """
    asked = {episode.template.bos for episode in episodes}
    if None in asked:
        habit = not isinstance(episodes[0].prompt, Tensor) and bos_habit(model)
        asked = {habit if one is None else one for one in asked}
    if len(asked) > 1:
        raise ValueError(
            "some of the episodes' templates put a BOS before the prompt and others do not; "
            "give all episodes the same one"
        )
    return bool(asked.pop())


def bos_habit(model: Any) -> bool:
    """Return whether the model's tokenizer adds a BOS by default.

    What counts is the tokenizer before TransformerLens changed it: TransformerLens reloads the
    tokenizers that it is given so that they add a BOS. It never removes one, so a tokenizer that
    adds none never did. Of any other the habit was noted when it was loaded, or it is reloaded by
    its name.

    Raises:
        ValueError: If the habit cannot be determined.
    """
    tokenizer = _tokenizer(model)
    if tokenizer not in _HABITS:
        _HABITS[tokenizer] = puts_bos(tokenizer) and _reloaded_puts_bos(tokenizer)
    return _HABITS[tokenizer]


def note_bos_habit(tokenizer: Any, habit: bool | None) -> None:
    """Remember a tokenizer's habit from before TransformerLens changed it, where it is known."""
    if habit is not None:
        _HABITS[tokenizer] = habit


def known_bos_habit(tokenizer: Any) -> bool | None:
    """Return the habit that was noted for a tokenizer, or None."""
    return None if tokenizer is None else _HABITS.get(tokenizer)


def habit_of(tokenizer: Any) -> bool:
    """Return the habit of a tokenizer that is not a model's yet: as noted, or as it is now."""
    known = known_bos_habit(tokenizer)
    return puts_bos(tokenizer) if known is None else known


def puts_bos(tokenizer: Any) -> bool:
    """Return whether a tokenizer adds a BOS now."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    return list(tokenizer("a")["input_ids"])[: 1 + len(bare)] == [bos, *bare]


# A memo, found once per tokenizer.
_HABITS: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _reloaded_puts_bos(tokenizer: Any) -> bool:
    from transformers import AutoTokenizer

    name = getattr(tokenizer, "name_or_path", "")
    try:
        return puts_bos(AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"it is unknown whether the tokenizer {name!r} puts a BOS before a prompt: "
            "TransformerLens may have changed it, and it cannot be reloaded "
            f"({type(error).__name__}). Say which: PromptTemplate(..., bos=True) or bos=False"
        ) from error


def separators(model: Any, episodes: Sequence[Any]) -> list[tuple[int, ...]]:
    """Return where each episode's separators are, counted in tokens from the prompt's end.

    A separator is the last token that ends where an example's output begins, or before.

    Raises:
        ValueError: If the tokenizer does not tell where its tokens are, or an episode does not tell
            where its examples' outputs begin.
    """
    for episode in episodes:
        if not hasattr(episode, "outputs_begin"):
            raise ValueError(
                f"{type(episode).__name__} has no outputs_begin, where its examples' outputs begin "
                "in the prompt, so its separators are unknown"
            )
    if isinstance(episodes[0].prompt, Tensor):
        return [
            tuple(begin - 1 - len(episode.prompt) for begin in episode.outputs_begin)
            for episode in episodes
        ]
    found = []
    for episode, spans in zip(episodes, token_spans(model, episodes), strict=True):
        ends = [end for _, end in spans]
        places = [bisect_right(ends, begin) - 1 - len(ends) for begin in episode.outputs_begin]
        found.append(tuple(places))
    return found


def token_spans(model: Any, episodes: Sequence[Any]) -> list[list[tuple[int, int]]]:
    """Return where in each episode's prompt its tokens begin and end, a BOS not counted.

    Places are in characters; in a prompt of vectors, each of these is one token.

    Raises:
        ValueError: If the tokenizer does not tell where its tokens are.
    """
    if isinstance(episodes[0].prompt, Tensor):
        return [[(at, at + 1) for at in range(len(episode.prompt))] for episode in episodes]
    tokenizer = _tokenizer(model)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where in the text its tokens are, so "
            "separators and other parts of a prompt cannot be found; use a fast tokenizer"
        )
    encoded = tokenizer(
        [episode.prompt for episode in episodes],
        add_special_tokens=False,
        return_offsets_mapping=True,
    )
    return [[(int(begin), int(end)) for begin, end in own] for own in encoded["offset_mapping"]]


def tokens_in(
    tokens: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> list[int | None]:
    """Return the number of the span that each token belongs to, None outside all of them.

    A token belongs to the span that holds its last character, so that a space or a separator that
    is merged into the next word goes with the word.

    Args:
        tokens: Where the tokens begin and end, from :func:`token_spans`.
        spans: Where the spans begin and end, in order and without overlap.

    Example:
        >>> tokens_in([(0, 3), (3, 6), (6, 7)], [(0, 3), (4, 6)])
        [0, 1, None]
    """
    begins = [begin for begin, _ in spans]
    found: list[int | None] = []
    for begin, end in tokens:
        last = max(begin, end - 1)
        span = bisect_right(begins, last) - 1
        found.append(span if span >= 0 and last < spans[span][1] else None)
    return found


def encode_answers(
    model: Any, episodes: Sequence[Any], *, stop: str | None = None
) -> list[list[int]]:
    """Return the token ids of each episode's answer, followed by the separator if ``stop`` says so.

    Raises:
        ValueError: If an answer has no tokens, or ``stop`` is neither None nor ``"separator"``.
    """
    if stop not in (None, "separator"):
        raise ValueError(f"stop is {stop!r}; it must be None or 'separator'")
    tokenizer = _tokenizer(model)
    answers = continuing_ids(tokenizer, [episode.answer for episode in episodes])
    for episode, ids in zip(episodes, answers, strict=True):
        if not ids:
            raise ValueError(
                f"the answer {episode.answer!r} of task {episode.task!r} has no tokens; "
                "an episode's answer must tokenise to at least one"
            )
    if stop == "separator":
        separators = continuing_ids(tokenizer, [episode.separator for episode in episodes])
        answers = [answer + end for answer, end in zip(answers, separators, strict=True)]
    return answers


_BEFORE = ("\n", ":", "0", "a")
"""Texts that an answer may continue; a tokenizer may merge one of them with it, but hardly all."""


def continuing_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts that continue another, without the mark of a beginning."""
    found = _token_ids(tokenizer, texts)
    (lone,) = _token_ids(tokenizer, ["a"])
    if tokenizer.decode([*lone, *lone]) == "aa":
        return found
    left = set(range(len(texts)))
    for before in _BEFORE:
        ahead, *wholes = _token_ids(tokenizer, [before, *(before + text for text in texts)])
        for row in list(left) if ahead else ():
            whole, text = wholes[row], tokenizer.decode(ahead) + texts[row]
            if whole[: len(ahead)] == ahead and tokenizer.decode(whole) == text:
                found[row] = whole[len(ahead) :]
                left.remove(row)
    return found


def decode(model: Any, ids: Sequence[int]) -> str:
    """Return the text of token ids that continue a text, without special tokens."""
    tokenizer = _tokenizer(model)
    (first,) = _token_ids(tokenizer, ["a"])
    before, whole = (
        tokenizer.decode(some, skip_special_tokens=True) for some in (first, [*first, *ids])
    )
    return str(whole[len(before) :])


def pad_id(model: Any) -> int:
    """Return a token id for left padding; it is masked, so any valid one will do."""
    if getattr(model, "tokenizer", None) is None:
        return 0
    return token_id(model, "pad") or 0


def token_id(model: Any, kind: str) -> int | None:
    """Return the id of the tokenizer's ``"bos"``, ``"eos"`` or ``"pad"`` token, or None."""
    value = getattr(_tokenizer(model), f"{kind}_token_id", None)
    return None if value is None else int(value)


def batches(
    encoded: Sequence[Tokens],
    *,
    batch_size: int,
    pad: int,
    same_length: bool = False,
    apart: int | None = None,
) -> Iterator[PromptBatch]:
    """Yield left-padded batches of prompts of similar length, the longest first.

    Args:
        encoded: Each prompt, from :func:`encode`.
        batch_size: The most rows per batch.
        pad: The token id of the padding.
        same_length: As for :func:`alike_in_length`.
        apart: As for :func:`alike_in_length`.
    """
    lengths = [len(tokens) for tokens in encoded]
    for rows in alike_in_length(lengths, batch_size, same_length=same_length, apart=apart):
        yield padded([encoded[row] for row in rows], rows, pad)


def alike_in_length(
    lengths: Sequence[int], batch_size: int, *, same_length: bool = False, apart: int | None = None
) -> list[tuple[int, ...]]:
    """Return the rows of each batch: of similar length, the longest first.

    Args:
        lengths: The number of tokens of each row.
        batch_size: The most rows per batch.
        same_length: Whether a batch has rows of one length only, for models without a usable
            attention mask.
        apart: Rows longer than this share a batch with those of their length only.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    n_batches = max(1, -(-len(order) // batch_size))
    batch_size = -(-len(order) // n_batches)  # as few batches, of similar size
    found: list[tuple[int, ...]] = []
    start = 0
    while start < len(order):
        width = lengths[order[start]]
        same = same_length or (apart is not None and width > apart)
        end = start + 1
        while (
            end < len(order)
            and end - start < batch_size
            and (not same or lengths[order[end]] == width)
        ):
            end += 1
        found.append(tuple(order[start:end]))
        start = end
    return found


def padded(prompts: Sequence[Tokens], rows: Sequence[int], pad: int) -> PromptBatch:
    """Return left-padded prompts as a batch, with the numbers ``rows``."""
    lengths = tuple(map(len, prompts))
    width = max(lengths)
    first = torch.as_tensor(prompts[0])
    tokens = first.new_full((len(prompts), width, *first.shape[1:]), pad)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        tokens[index, width - length :] = torch.as_tensor(prompt)
        mask[index, width - length :] = True
    return PromptBatch(tokens, mask, tuple(rows), lengths)


def right_padded(
    answers: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "row answer_pos"], Bool[Tensor, "row answer_pos"]]:
    """Return right-padded answers, and where they are real."""
    longest = max(map(len, answers))
    ids = torch.zeros(len(answers), longest, dtype=torch.long)
    mask = torch.zeros(len(answers), longest, dtype=torch.bool)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = torch.tensor(answer)
        mask[row, : len(answer)] = True
    return ids.to(device), mask.to(device)


def row_indices(position: Position, lengths: Sequence[int], width: int) -> Int[Tensor, "row at"]:
    """Return the indices of positions of left-padded prompts in their rows.

    Example:
        >>> row_indices((0, -1), lengths=[3, 2], width=3).tolist()
        [[0, 2], [1, 2]]

    Raises:
        ValueError: If a prompt has no such position.
    """
    if isinstance(position, Separator | Each):
        raise ValueError(
            f"where {position!r} is depends on the episode; give the intervention to evaluate, "
            "evaluate_many or generate, with episodes"
        )
    if position is None:
        return repeat(torch.arange(width), "at -> row at", row=len(lengths))
    positions = (position,) if isinstance(position, int) else position
    shortest = min(lengths)
    for one in positions:
        if not -shortest <= one < shortest:
            raise ValueError(f"position {one} is outside a prompt of {shortest} token(s)")
    return torch.tensor(
        [
            [width + one if one < 0 else width - length + one for one in positions]
            for length in lengths
        ]
    )


def _tokenizer(model: Any) -> Any:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            "the model has no tokenizer; load it with one, or set model.tokenizer before use"
        )
    return tokenizer


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
