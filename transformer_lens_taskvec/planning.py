"""What an evaluation will cost, known before it runs.

The engine itself makes the plan: it is given a model that counts what it is asked to run and runs
nothing. So tokens and passes are exact. Time and memory are those of a few passes like them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from transformer_lens_taskvec._utils.metrics import ALWAYS, Metric
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import Observe
from transformer_lens_taskvec.models import counted, replay
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.counted import Count, Counted
from transformer_lens_taskvec.models.protocol import inference
from transformer_lens_taskvec.prompts import AnyEpisode
from transformer_lens_taskvec.scoring import Variants, evaluate_many


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What a job will run, and what that takes.

    Attributes:
        by_kind: The numbers of passes and of tokens by kind of pass: ``prompts``, ``branches`` of
            prompts that run once, ``whole`` sequences, and ``numbers`` (vectors of the lab); of a
            training, ``training`` and ``evaluation``.
        peak_memory: The bytes of tensors that are there at once, above the model's. A CPU's
            allocator may keep as much again of what was freed.
        seconds: The time, by ``tokens_per_second`` if they were given, or measured on passes of
            the same kinds and on the rest of the job.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> plan = tv.plan(model, episodes, [[]], tokens_per_second=1000)
        >>> plan.passes < len(episodes), plan.seconds == plan.tokens / 1000
        (True, True)
    """

    by_kind: Mapping[str, tuple[int, int]]
    peak_memory: int
    seconds: float

    @property
    def passes(self) -> int:
        """The number of forward calls."""
        return sum(passes for passes, _ in self.by_kind.values())

    @property
    def tokens(self) -> int:
        """The tokens that run, padding included, each counted by the share of blocks it enters."""
        return sum(tokens for _, tokens in self.by_kind.values())

    @property
    def minutes(self) -> float:
        """The time in minutes."""
        return self.seconds / 60

    def to_frame(self) -> pd.DataFrame:
        """Return one row per kind of pass: ``kind, passes, tokens``."""
        rows = [(kind, *numbers) for kind, numbers in self.by_kind.items()]
        return pd.DataFrame(rows, columns=["kind", "passes", "tokens"])

    @property
    def lines(self) -> list[str]:
        """The plan in a few lines."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        minutes = "less than 0.1" if self.minutes < 0.1 else f"about {self.minutes:,.1f}"
        return [
            f"{self.tokens:,} tokens in {self.passes:,} passes",
            f"peak memory {self.peak_memory / 2**20:,.0f} MB above the model's",
            f"{minutes} minutes, at {rate:,.0f} tokens/s",
        ]

    def __repr__(self) -> str:
        return f"Plan({', '.join(self.lines)})"


def plan(
    model: Any,
    episodes: Sequence[AnyEpisode],
    variants: Variants,
    *,
    observe: Observe | None = None,
    metrics: Iterable[str | Metric] = ALWAYS,
    stop: str | None = None,
    max_tokens: int | None = None,
    keep_text: bool = False,
    tokens_per_second: float | None = None,
) -> Plan:
    """Return what :func:`evaluate_many` would run with the same arguments, without running it.

    Tokens and passes are exact, unless an intervention makes activations infinite; with
    ``keep_text`` they are the most that there can be, as if every answer were wrong. For time and
    memory a few passes with few rows run on the model, some seconds in all, without hooks that were
    put on its hook points. The caller's own hook functions are not called.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: As for :func:`evaluate_many`.
        variants: As for :func:`evaluate_many`.
        observe: As for :func:`evaluate_many`.
        metrics: As for :func:`evaluate_many`; they are measured on random logits.
        stop: As for :func:`evaluate_many`.
        max_tokens: As for :func:`evaluate_many`.
        keep_text: As for :func:`evaluate_many`.
        tokens_per_second: How many tokens the model runs in a second, if that is known; by default
            it is measured.

    Raises:
        ValueError: As for :func:`evaluate_many`, or if ``tokens_per_second`` is not positive.

    Warns:
        UserWarning: As :func:`evaluate_many`, if the model cannot share the pass.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> ablations = [[tv.ablate(layer)] for layer in range(4)]
        >>> one, five = tv.plan(model, episodes, [[]]), tv.plan(model, episodes, [[], *ablations])
        >>> one.tokens < five.tokens < 2 * one.tokens  # the prompts' tokens run once
        True
    """
    check_rate(tokens_per_second)
    options: dict[str, Any] = {
        "metrics": list(metrics),
        "stop": stop,
        "max_tokens": max_tokens,
        "keep_text": keep_text,
    }
    variants = variants if callable(variants) else [list(variant) for variant in variants]
    with inference(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        capabilities(model)
        # What is asked of a model once is no part of the job.
        nothing = Counted(model, Count())
        evaluate_many(nothing, episodes[:1], variants, observe=observe, **options)
    count = Count()
    started = counted.clock()
    evaluate_many(Counted(model, count), episodes, variants, observe=observe, **options)
    own = counted.clock() - started - count.seconds
    return planned(model, count, own, tokens_per_second)


def plan_job(job: Callable[[Callable[[Any], Any], Path], Any]) -> Plan:
    """Return what a job would run, without running it or keeping what it writes.

    Results are random, so warnings about them are not shown.

    Args:
        job: Does all of the work, with a function that every model goes through first, and in the
            folder that it is given.
    """
    count, models = Count(), list[Any]()

    def stand_in(model: Any) -> Any:
        started = counted.clock()
        with inference(model):
            capabilities(model)
        count.seconds += counted.clock() - started
        models.append(model)
        return Counted(model, count)

    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = counted.clock()
        job(stand_in, Path(folder))
        own = counted.clock() - started - count.seconds
    return planned(models[-1], count, own, None)


def planned(model: Any, count: Count, own: float, tokens_per_second: float | None) -> Plan:
    """Return the plan of what was counted.

    Args:
        model: The model that it was counted for.
        count: What was counted.
        own: How many seconds a job takes besides its passes.
        tokens_per_second: As for :func:`plan`.
    """
    depth, by_kind = int(model.cfg.n_layers), dict[str, tuple[int, int]]()
    for kind in dict.fromkeys(one.kind for one in count.passes):
        some = [one for one in count.passes if one.kind == kind]
        entering = sum(one.rows * sum(one.layers) for one in some)
        by_kind[kind] = len(some), round(entering / depth)
    tokens = sum(tokens for _, tokens in by_kind.values())
    if tokens_per_second is None:
        seconds = own + replay.seconds(model, count)
    else:
        seconds = tokens / tokens_per_second
    return Plan(by_kind, replay.peak_bytes(model, count), seconds)


def check_rate(tokens_per_second: float | None) -> None:
    """Raise ``ValueError`` unless a rate is positive, or None."""
    if tokens_per_second is not None and not tokens_per_second > 0:
        raise ValueError(
            f"tokens_per_second is {tokens_per_second}; it must be positive, or None to measure it"
        )
