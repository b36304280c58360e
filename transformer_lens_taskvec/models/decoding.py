"""How the next token is chosen, and where a continuation ends, by transformers' own parts.

A ``GenerationConfig`` says which of transformers' processors and warpers change the logits, and in
the order of transformers' ``generate``. A field that is None is off. Fields that would not act are
refused.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria

from transformer_lens_taskvec.models.protocol import device_of
from transformer_lens_taskvec.models.tokens import decode, token_id

Stop: TypeAlias = str | StoppingCriteria
"""A text before which a continuation ends, or a criterion of transformers, after whose token."""


@dataclass(frozen=True)
class _Row:
    """What a processor is made of, besides its field's value."""

    prompt_length: int
    ends: list[int]
    device: str


_PROCESSORS: Mapping[str, Callable[[Any, _Row], Any]] = {
    "sequence_bias": lambda value, row: transformers.SequenceBiasLogitsProcessor(value),
    "repetition_penalty": lambda value, row: transformers.RepetitionPenaltyLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, row: transformers.NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": lambda value, row: transformers.NoBadWordsLogitsProcessor(
        value, row.ends or None
    ),
    "min_new_tokens": lambda value, row: transformers.MinNewTokensLengthLogitsProcessor(
        row.prompt_length, value, row.ends, device=row.device
    ),
    "suppress_tokens": lambda value, row: transformers.SuppressTokensLogitsProcessor(
        value, device=row.device
    ),
    "begin_suppress_tokens": lambda value, row: transformers.SuppressTokensAtBeginLogitsProcessor(
        value, row.prompt_length, device=row.device
    ),
}
"""What changes logits by the tokens so far, in transformers' order."""

_WARPERS: Mapping[str, Callable[[Any, str], Any]] = {
    "temperature": lambda value, device: transformers.TemperatureLogitsWarper(float(value)),
    "top_k": lambda value, device: transformers.TopKLogitsWarper(value),
    "top_p": lambda value, device: transformers.TopPLogitsWarper(value),
    "min_p": lambda value, device: transformers.MinPLogitsWarper(value),
    "typical_p": lambda value, device: transformers.TypicalLogitsWarper(value),
    "epsilon_cutoff": lambda value, device: transformers.EpsilonLogitsWarper(value),
    "eta_cutoff": lambda value, device: transformers.EtaLogitsWarper(value, device=device),
}
"""What changes the distribution that is sampled from, in transformers' order."""

_BEAMS = ("num_beams", "early_stopping", "length_penalty")
_HONOURED = ("max_new_tokens", "do_sample", "eos_token_id", "stop_strings", "use_cache", *_BEAMS)
_NAMES = ("bos_token_id", "pad_token_id", "transformers_version")

_OFF: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "temperature", "length_penalty"), (1.0,)),
    **dict.fromkeys(("top_p", "typical_p"), (1.0,)),
    **dict.fromkeys(("top_k", "no_repeat_ngram_size", "min_new_tokens", "min_length"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty"), (0.0,)),
    **dict.fromkeys(("num_return_sequences", "num_beam_groups", "num_beams"), (1,)),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), (1.0,)),
    "encoder_no_repeat_ngram_size": (0,),
}
"""Values besides None and False, and those of an empty config, with which a field does nothing."""


@dataclass(frozen=True, eq=False)
class Decoding:
    """How continuations are decoded; made by :func:`decoding_of`.

    Attributes:
        config: What transformers' processors are made of.
        max_new_tokens: The most tokens per continuation.
        seed: Seed of the sampling.
        ends: Tokens that end a continuation, and do not belong to its text.
        stops: What else ends it.
    """

    config: GenerationConfig
    max_new_tokens: int
    seed: int
    ends: tuple[int, ...]
    stops: tuple[Stop, ...]

    @property
    def n_beams(self) -> int:
        """The number of beams, 1 without a search."""
        return self.config.num_beams or 1

    @property
    def stop_texts(self) -> list[str]:
        """The texts among ``stops``."""
        return [stop for stop in self.stops if isinstance(stop, str)]

    def is_finished(
        self, model: Any, prompt: Sequence[int], ids: Sequence[int], scores: Tensor
    ) -> bool:
        """Return whether the last token ends a continuation.

        Args:
            model: The model with the tokenizer.
            prompt: The prompt's tokens.
            ids: The continuation's tokens so far.
            scores: ``[vocab]``, which the last one was chosen by.
        """
        if ids[-1] in self.ends:
            return True
        for stop in self.stops:
            if not isinstance(stop, str):
                whole = torch.tensor([[*prompt, *ids]], device=scores.device)
                if bool(torch.as_tensor(stop(whole, scores[None])).all()):
                    return True
                continue
            # A character has up to four tokens; only these can have completed the text.
            if all(stop in decode(model, some) for some in (ids[-4 * len(stop) - 8 :], ids)):
                return True
        return False

    def text(self, model: Any, ids: Sequence[int]) -> str:
        """Return a continuation up to its end."""
        text = decode(model, ids[:-1] if ids and ids[-1] in self.ends else ids)
        found = [text.index(stop) for stop in self.stop_texts if stop in text]
        return text[: min(found, default=len(text))]


@dataclass(frozen=True, eq=False)
class Choice:
    """The choice of tokens that continue some prompts; made by :func:`choice_of`.

    Attributes:
        prompts: Each prompt's tokens, which processors see without padding.
        processors: Of each prompt.
        warpers: Of all.
        generators: Of each prompt, none for the most likely token.
    """

    prompts: tuple[Sequence[int], ...]
    processors: tuple[LogitsProcessorList, ...]
    warpers: LogitsProcessorList
    generators: tuple[torch.Generator, ...]

    def scores(
        self, logits: Float[Tensor, "row vocab"], added: Sequence[Sequence[int]]
    ) -> Float[Tensor, "row vocab"]:
        """Return the logits after processors and warpers; ``added`` has the tokens so far."""
        scores = logits.float()
        if any(self.processors):
            changed = [
                own(torch.tensor([[*prompt, *ids]], device=scores.device), row[None])
                for own, prompt, ids, row in zip(
                    self.processors, self.prompts, added, scores.clone(), strict=True
                )
            ]
            scores = torch.cat(changed)
        if not self.warpers:
            return scores
        nothing = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)
        return torch.as_tensor(self.warpers(nothing, scores))

    def tokens(self, scores: Float[Tensor, "row vocab"]) -> Int[Tensor, " row"]:
        """Return the tokens chosen by scores."""
        if not self.generators:
            return scores.argmax(dim=-1)
        probabilities = scores.softmax(dim=-1)
        drawn = [
            torch.multinomial(own, 1, generator=generator)
            for own, generator in zip(probabilities, self.generators, strict=True)
        ]
        return torch.cat(drawn)


def decoding_of(
    model: Any,
    config: GenerationConfig | None = None,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Stop | Sequence[Stop] | None = None,
) -> Decoding:
    """Return how continuations are decoded; the arguments are those of :func:`generate`.

    Raises:
        ValueError: If a number is out of range, something is given twice, or a field of the config
            would not act.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformers import GenerationConfig
        >>> model = tv.load_model("toy")
        >>> decoding_of(model, GenerationConfig(top_p=0.9), max_new_tokens=5)
        Traceback (most recent call last):
        ...
        ValueError: config has top_p=0.9, which acts in sampling only; set do_sample=True
    """
    if config is not None:
        _check(config)
    if config is not None and temperature != 0:
        raise ValueError(
            f"config and temperature={temperature} are both given; put the temperature in the "
            "config, with do_sample=True"
        )
    asked = None if config is None else config.max_new_tokens
    if (asked is None) == (max_new_tokens is None):
        raise ValueError(
            f"max_new_tokens is {max_new_tokens} and the config's {asked}; give it in one place"
        )
    n_new = max_new_tokens if asked is None else asked
    assert n_new is not None
    if n_new < 1 or temperature < 0:
        raise ValueError(
            f"max_new_tokens is {n_new} and temperature {temperature}; they must be at least 1 "
            "and 0"
        )
    if config is None:
        sampled = {"do_sample": True, "temperature": float(temperature), "top_k": 0}
        config = GenerationConfig(**sampled) if temperature else GenerationConfig()
    single = isinstance(stop, str | StoppingCriteria) or not isinstance(stop, Sequence)
    given: list[Any] = [] if stop is None else [stop] if single else [*stop]
    texts = config.stop_strings or []
    stops = (*given, *([texts] if isinstance(texts, str) else texts))
    for stop in stops:
        if not isinstance(stop, str | StoppingCriteria):
            raise ValueError(f"stop has {stop!r}; give texts, or transformers.StoppingCriteria")
        if isinstance(stop, str) and stop in _special(model):
            raise ValueError(
                f"stop has {stop!r}, a special token, which is no text of a continuation; name it "
                "in config: GenerationConfig(eos_token_id=...)"
            )
    if "" in stops:
        raise ValueError("stop has an empty text, which ends every continuation; leave it out")
    ends = config.eos_token_id
    if ends is None:
        ends = token_id(model, "eos")
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return Decoding(config, n_new, seed, tuple(ends), stops)


def _special(model: Any) -> Sequence[str]:
    """Return the texts of the tokenizer's special tokens."""
    tokenizer = getattr(model, "tokenizer", None)
    found: Sequence[str] = getattr(tokenizer, "all_special_tokens", ())
    return found


def choice_of(
    model: Any,
    decoding: Decoding,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
) -> Choice:
    """Return the choice of tokens that continue some of the prompts.

    Args:
        model: Any model.
        decoding: How they are decoded.
        prompts: The tokens of all prompts; one given twice is sampled twice.
        rows: The prompts that are continued.
    """
    config, device = decoding.config, device_of(model)
    generators: tuple[torch.Generator, ...] = ()
    warpers: list[Any] = []
    if config.do_sample:
        numbers = occurrences(prompts)
        generators = tuple(
            torch.Generator(device).manual_seed(seed_of(decoding.seed, prompts[row], numbers[row]))
            for row in rows
        )
        warpers = [
            make(getattr(config, name), str(device))
            for name, make in _WARPERS.items()
            if _acts(config, name)
        ]
    acting = [name for name in _PROCESSORS if _acts(config, name)]
    processors = tuple(
        LogitsProcessorList(
            _PROCESSORS[name](
                getattr(config, name), _Row(len(prompts[row]), list(decoding.ends), str(device))
            )
            for name in acting
        )
        for row in rows
    )
    return Choice(
        tuple(prompts[row] for row in rows), processors, LogitsProcessorList(warpers), generators
    )


def occurrences(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return how many times each prompt came before in the list.

    Example:
        >>> occurrences([[1, 2], [3], [1, 2]])
        [0, 0, 1]
    """
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for prompt in prompts:
        key = tuple(prompt)
        found.append(seen[key])
        seen[key] += 1
    return found


def seed_of(seed: int, prompt: Sequence[int], number: int) -> int:
    """Return the seed of one prompt's sampling, which no other prompt has a part in."""
    key = repr((seed, number, [int(token) for token in prompt])).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def _acts(config: GenerationConfig, name: str) -> bool:
    value = getattr(config, name, None)
    return value is not None and value is not False and value not in _OFF.get(name, ())


def _check(config: GenerationConfig) -> None:
    """Raise ``ValueError`` for a field that would not act."""
    empty = vars(GenerationConfig())
    for name, value in vars(config).items():
        if name.startswith("_") or name in (*_NAMES, *_HONOURED, *_PROCESSORS):
            continue
        if value == empty.get(name) or not _acts(config, name):
            continue
        if name not in _WARPERS:
            known = ", ".join((*_PROCESSORS, *_WARPERS, *_HONOURED))
            raise ValueError(
                f"config has {name}={value!r}, which generate does not take; it takes: {known}"
            )
        if not config.do_sample:
            raise ValueError(
                f"config has {name}={value!r}, which acts in sampling only; set do_sample=True"
            )
    n_beams = config.num_beams or 1
    if n_beams > 1 and config.do_sample:
        raise ValueError(
            f"config has num_beams={n_beams} and do_sample=True; beams are searched, not sampled, "
            "so that they depend on no other prompt. Set one of them"
        )
    for name in _BEAMS[1:]:
        if n_beams == 1 and _acts(config, name) and getattr(config, name) != empty.get(name):
            raise ValueError(
                f"config has {name}={getattr(config, name)!r}, which acts on beams only; set "
                "num_beams above 1"
            )
