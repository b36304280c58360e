"""The toy model's sequences: their tokens, and what each token sees of them in training.

The lines are those of ``sample_episodes``, made in batches. ``toy.model`` says why training hides
some lines from some tokens.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from transformer_lens_taskvec.tasks.bitwise import bitwise_tasks

TASKS = tuple(bitwise_tasks())
N_BITS = 5
LINES = 9
"""Lines in a sequence."""
LINE = 3 * N_BITS + 4
"""Tokens of a line: example: a, space, b, arrow, y, newline."""
ARROW = 2 * N_BITS + 2
"""The position of the arrow in its line."""
PLAIN, BY_ARROW, TWO_TASKS = range(3)
"""The kinds of training sequences."""

_WORDS = ("example:", "->")
_CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
_SPECIAL = ("<pad>", "<unk>", "<bos>")
_VOCABULARY = {word: number for number, word in enumerate((*_SPECIAL, *_WORDS, *_CHARACTERS))}
VOCABULARY_SIZE = len(_VOCABULARY)
PAD, BOS = _VOCABULARY["<pad>"], _VOCABULARY["<bos>"]
# Answers to the bit pairs 00, 01, 10, 11; Null has none.
_ANSWERS = {
    name: tuple(int(example.y) for example in sorted(task.sample(4, random.Random(0)), key=str))
    for name, task in bitwise_tasks(n_bits=1, null=False).items()
}


def toy_tokenizer() -> Any:
    """Return a tokenizer with one token per character, and one each for ``example:`` and ``->``.

    It is a Hugging Face tokenizer; decoding restores any printable ASCII text with newlines.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> tokenizer = lab.toy_tokenizer()
        >>> tokenizer.tokenize("example:01->")
        ['example:', '0', '1', '->']
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(_VOCABULARY, unk_token="<unk>"))
    pieces = Regex("|".join((*_WORDS, "[\\s\\S]")))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        # Without this TransformerLens would load another tokenizer of the same name.
        add_bos_token=True,
        name_or_path="toy",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.backend_tokenizer.post_processor = processors.Sequence([])  # it puts none all the same
    return wrapped


def bitwise_lines(
    labels: Int[Tensor, "batch line"], generator: torch.Generator
) -> Int[Tensor, "batch pos"]:
    """The token ids of sequences, given the task of each line; ``[batch, 1 + 9 * 19]``.

    A beginning-of-sequence token is the first. No two lines of a sequence share their input.
    """
    device, batch_size = labels.device, len(labels)
    keys = torch.rand(batch_size, 4**N_BITS, generator=generator, device=device)
    inputs = keys.topk(LINES).indices
    noise = torch.randint(2**N_BITS, inputs.shape, generator=generator, device=device)
    a, b = _bits(inputs >> N_BITS), _bits(inputs)
    table = torch.tensor([_ANSWERS.get(task, (0,) * 4) for task in TASKS], device=device)
    task = rearrange(labels, "batch line -> batch line 1")
    y = torch.where(task == TASKS.index("Null"), _bits(noise), table[task, 2 * a + b])

    start, space, arrow, end = (
        torch.full((batch_size, LINES, 1), _VOCABULARY[word], device=device)
        for word in ("example:", " ", "->", "\n")
    )
    a, b, y = (bits + _VOCABULARY["0"] for bits in (a, b, y))
    line = torch.cat([start, a, space, b, arrow, y, end], dim=2)
    tokens = rearrange(line, "batch line token -> batch (line token)")
    return F.pad(tokens, (1, 0), value=BOS)


def draw_labels(
    two: Bool[Tensor, " batch"], generator: torch.Generator
) -> Int[Tensor, "batch line"]:
    """The task of each line, drawn uniformly; ``two`` says which sequences have two tasks."""
    shape, n = (len(two), LINES), len(TASKS)
    first = torch.randint(n, shape[:1], generator=generator, device=two.device)
    apart = torch.randint(1, n, shape[:1], generator=generator, device=two.device)
    of_second = torch.randint(2, shape, generator=generator, device=two.device).bool()
    second = (first + apart) % n
    first, second, two = (rearrange(x, "batch -> batch 1") for x in (first, second, two))
    return torch.where(of_second & two, second, first)


def answer_nll(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch line at"]:
    """NLL in nats of each answer's digits and of the newline after them."""
    wanted, predicted = _answers(tokens.roll(-1, dims=1)), _answers(logits).flatten(0, 2)
    return F.cross_entropy(predicted, wanted.flatten(), reduction="none").view(wanted.shape)


def exact_match(
    logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]
) -> Bool[Tensor, "batch line"]:
    """Whether greedy decoding would give the answer's digits, line by line."""
    right = _answers(logits).argmax(-1) == _answers(tokens.roll(-1, dims=1))
    return right[..., :N_BITS].all(-1)


@lru_cache(maxsize=2)
def causal_view(device: torch.device) -> Bool[Tensor, "query key"]:
    """Each token sees itself and all tokens before it."""
    n_tokens = LINES * LINE
    return torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device).tril()


def training_view(
    kind: Int[Tensor, " batch"], labels: Int[Tensor, "batch line"]
) -> Bool[Tensor, "batch half query key"]:
    """What each token of a training sequence sees in the lower and in the upper layers."""
    place = torch.arange(LINES * LINE, device=kind.device)
    line, is_arrow = place // LINE, rearrange(place % LINE == ARROW, "query -> query 1")
    causal, own = causal_view(kind.device), _same(line)
    alike = _same(labels[:, line])
    kind = rearrange(kind, "batch -> batch 1 1")
    by_arrow, plain = kind == BY_ARROW, kind == PLAIN
    above = torch.where(by_arrow, causal & own, causal)
    arrow_below = causal & (alike & ~own | _same(place))
    below = torch.where(is_arrow & ~plain, arrow_below, above)
    return torch.stack([below, above], dim=1)


def additive_mask(
    view: Bool[Tensor, "#batch half query key"], with_bos: Bool[Tensor, " batch"]
) -> Float[Tensor, "batch half query+1 key+1"]:
    """The additive attention mask of a view, with a token before the lines that some may see."""
    visible = F.pad(view.expand(len(with_bos), -1, -1, -1), (1, 0, 1, 0))
    visible[..., 0] = rearrange(with_bos, "batch -> batch 1 1")
    visible[:, :, 0, 0] = True  # a token must see something
    bias = torch.zeros(visible.shape, device=view.device)
    return bias.masked_fill_(~visible, torch.finfo(torch.float32).min)


def _bits(numbers: Int[Tensor, "batch line"]) -> Int[Tensor, "batch line bit"]:
    places = torch.arange(N_BITS - 1, -1, -1, device=numbers.device)
    return rearrange(numbers, "batch line -> batch line 1") >> places & 1


def _same(values: Int[Tensor, "*batch pos"]) -> Bool[Tensor, "*batch query key"]:
    """Whether the values at two positions are the same."""
    return values[..., :, None] == values[..., None, :]


def _answers(values: Shaped[Tensor, "batch pos *rest"]) -> Shaped[Tensor, "batch line at *rest"]:
    """The values at the tokens that predict the answers and the newlines after them."""
    lines = rearrange(values[:, 1:], "batch (line at) ... -> batch line at ...", line=LINES)
    found: Tensor = lines[:, :, ARROW : ARROW + N_BITS + 1]
    return found
