"""A transformer whose truth is known: its weights are set by hand, and it is never trained.

The tasks are shifts on a ring: task ``t`` answers query ``q_i`` with ``a_{i + t}``. A prompt is
``q > a ; q > a ; ... ; q >``, so that every token's place tells its part. Of five layers,

- layer 0 pairs: one head lets each answer see its query, and its MLP writes the shift between the
  two, a direction of its own for every task, at the answer's token;
- layer 1 *encodes*: one head (:data:`WRITER`) averages these shifts at the last token, into other
  directions (:func:`planted_directions`), orthogonal and of one length, the root of two;
- layer 2 does nothing;
- layer 3 *decodes*: one head (:data:`READER`) fetches the query, and the MLP turns (task, query)
  into the answer;
- layer 4 does nothing.

So the last token holds nothing of the task after layer 0, all of it from layer 1 on, and a task
vector put in its place works after layers 1 and 2 only. Features come as a number and its negative,
which gives every activation mean zero, and one constant feature is so much larger than all others
that layer norms divide by nearly the same number everywhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import transformer_lens_taskvec as tv

N_QUERIES, SHIFTS, N_GROUPS = 6, (0, 1, 3), 9
N_LAYERS, N_HEADS = 5, 4
WRITER, READER = (1, 2), (3, 1)
WORKS = (1, 2)
"""Layers after which an injected task vector does the task."""

TEMPLATE = tv.PromptTemplate("{x} > {y}", query="{x} >", separator=" ; ")

_SIZES = {
    "query": N_QUERIES,  # of the token itself
    "answer": N_QUERIES,
    "partner": N_QUERIES,  # the query, at its answer's token
    "shift": len(SHIFTS),  # at an answer's token
    "task": len(SHIFTS),  # at the last token
    "asked": N_QUERIES,  # the query, at the last token
    "out": N_QUERIES,
    "group": N_GROUPS,  # which pair
    "role": 4,  # query, arrow, answer, separator
    "constant": 1,
}
_FIRST = {name: sum(list(_SIZES.values())[:i]) for i, name in enumerate(_SIZES)}
_HALF = 56
_CONSTANT, _SHARP = 100.0, 60.0


def feature(name: str, index: int = 0) -> torch.Tensor:
    """``[d_model]``: the direction of a feature of length one in its number."""
    vector = torch.zeros(2 * _HALF)
    at = _FIRST[name] + index
    vector[at], vector[_HALF + at] = 1.0, -1.0
    return vector


def planted_directions() -> torch.Tensor:
    """``[task, d_model]``, what the encoding head writes for each task."""
    return torch.stack([feature("task", index) for index in range(len(SHIFTS))])


def tasks() -> dict[str, tv.Task]:
    """The shifts, by name."""
    return {
        f"shift {shift}": tv.mapping_task(
            f"shift {shift}",
            {f"q{i}": f"a{(i + shift) % N_QUERIES}" for i in range(N_QUERIES)},
        )
        for shift in SHIFTS
    }


@dataclass(frozen=True)
class Null:
    """Answers at random: as many shifts one way as the other."""

    name: str = "Null"

    def __len__(self) -> int:
        return N_QUERIES

    def sample(self, n: int, rng: random.Random) -> list[tv.Example]:
        queries = rng.sample(range(N_QUERIES), n)
        return [tv.Example(f"q{i}", f"a{rng.randrange(N_QUERIES)}") for i in queries]


def planted() -> Any:
    """The model, as a ``TransformerBridge`` with its tokenizer."""
    words = [">", ";", *(f"{kind}{i}" for kind in "qa" for i in range(N_QUERIES)), "?"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    config = GPT2Config(
        vocab_size=len(words),
        n_positions=4 * N_GROUPS,
        n_embd=2 * _HALF,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_inner=N_QUERIES * len(SHIFTS),
        tie_word_embeddings=False,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    config.architectures = ["GPT2LMHeadModel"]
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        _set_weights(model, vocabulary)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", pad_token="?")
    return tv.bridge_from_hf(model, wrapped, device="cpu")


def _set_weights(model: Any, vocabulary: dict[str, int]) -> None:
    body = model.transformer
    for i in range(N_QUERIES):
        body.wte.weight[vocabulary[f"q{i}"]] = feature("query", i)
        body.wte.weight[vocabulary[f"a{i}"]] = feature("answer", i)
        model.lm_head.weight[vocabulary[f"a{i}"]] = 20 * _reading("out", i)
    model.lm_head.weight[vocabulary[">"]] = _always()  # what is said where there is no answer
    for position in range(4 * N_GROUPS):
        group, role = divmod(position, 4)
        body.wpe.weight[position] = (
            _CONSTANT * feature("constant") + feature("group", group) + feature("role", role)
        )
    groups = [(_reading("group", g), _reading("group", g)) for g in range(N_GROUPS)]
    to_query = (_always(), _reading("role", 0))
    arrows = (3 * _reading("role", 1), _reading("role", 1))  # arrows see arrows, which hold nothing
    _set_head(body.h[0], 0, [*groups, to_query, arrows], _copies("query", "partner"))
    pairs = [
        (i, (i + shift) % N_QUERIES, t) for t, shift in enumerate(SHIFTS) for i in range(N_QUERIES)
    ]
    for unit, (i, j, t) in enumerate(pairs):
        _set_unit(body.h[0], unit, ("partner", i), ("answer", j), feature("shift", t))
        _set_unit(body.h[3], unit, ("task", t), ("asked", i), feature("out", j))
    _set_head(
        body.h[WRITER[0]],
        WRITER[1],
        [(_always(), _reading("role", 2))],
        _copies("shift", "task"),
    )
    last = sum(g / N_GROUPS * _reading("group", g) for g in range(N_GROUPS))
    _set_head(
        body.h[READER[0]],
        READER[1],
        [(10 * _always(), _reading("role", 0)), (10 * _always(), last)],
        _copies("query", "asked"),
    )


def _reading(name: str, index: int = 0) -> torch.Tensor:
    """Gives a feature's number when multiplied with an activation behind its layer norm."""
    return feature(name, index) / 2 * _CONSTANT / _HALF**0.5


def _always() -> torch.Tensor:
    return _reading("constant") / _CONSTANT


def _copies(source: str, target: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(_reading(source, i), feature(target, i)) for i in range(_SIZES[source])]


def _set_head(
    block: Any,
    head: int,
    matches: list[tuple[torch.Tensor, torch.Tensor]],
    copies: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Let a head look where query and key match, and copy what it reads there."""
    width, d_head = 2 * _HALF, 2 * _HALF // N_HEADS
    start = head * d_head
    attention = block.attn.c_attn.weight
    for index, (query, key) in enumerate(matches):
        attention[:, start + index] = query * _SHARP * d_head**0.5
        attention[:, width + start + index] = key
    for index, (read, write) in enumerate(copies):
        attention[:, 2 * width + start + index] = read
        block.attn.c_proj.weight[start + index] = write


def _set_unit(
    block: Any, unit: int, first: tuple[str, int], second: tuple[str, int], write: torch.Tensor
) -> None:
    """Let a hidden unit write where both features are there, each with number one."""
    block.mlp.c_fc.weight[:, unit] = 40 * (_reading(*first) + _reading(*second))
    block.mlp.c_fc.bias[unit] = -40 * 1.5
    block.mlp.c_proj.weight[unit] = write / 20
