"""Constituent-aware pooling: whether a model needs the tokens of a word or phrase one by one.

The tokens of each constituent of the prompt, such as a word, are pooled in the residual stream
before every block from a start layer on, and what they are pooled to is written back to all of
them. If the layers before have composed the constituent, little is lost (Aljaafari et al. 2024,
arXiv 2410.12924). The control pools as many spans of the same numbers of tokens at random places.

Unlike the paper's code this pools the residual stream only, so that attention patterns still sum to
one, and keeps the length of the prompt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import share_interval
from transformer_lens_taskvec.activations import Observe, layer_index
from transformer_lens_taskvec.analysis.classifiers import readout
from transformer_lens_taskvec.analysis.comparison import Comparison, compare
from transformer_lens_taskvec.analysis.decodability import task_decodability
from transformer_lens_taskvec.interventions.variants import PromptHook
from transformer_lens_taskvec.models.protocol import check_layers, hook_name
from transformer_lens_taskvec.models.tokens import PromptBatch, token_spans, tokens_in
from transformer_lens_taskvec.prompts import AnyEpisode
from transformer_lens_taskvec.scoring import Scores, evaluate, evaluate_many

Span = tuple[int, int]
"""Where something begins and ends."""

Spans = str | Callable[[Any], Sequence[Span]] | Sequence[Sequence[Span]]
"""``"words"``, or the constituents of each episode's prompt, in characters, or a function."""

CONTROL = "random spans"
_HOW = {"mean": "mean", "max": "amax", "sum": "sum"}
"""The ways of pooling, and torch's names of them."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, repr=False)
class PoolingRobustness(Shown):
    """How well the model does when constituents are pooled, by the layer where pooling starts.

    Attributes:
        pooled: By name (``"constituents"``, ``"random spans"``), the scores for each start layer.
            With two tasks or more they have a metric ``decoded``: 1 where the task is read off the
            last token's state by its nearest neighbours, as in :func:`task_decodability`.
        unpooled: Scores of the same prompts without pooling.
        start_layers: The layers before which pooling starts, counted from 0.
        layer: The layer after which states are decoded; None for a single task.
        how: ``"mean"``, ``"max"`` or ``"sum"``.
        reduction: The mean share of a prompt's tokens that pooling makes equal to others.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 6, 4, seed=0)
        >>> found = pooling_robustness(model, episodes, start_layers=[0, 3], k=5)
        >>> found.accuracy("constituents").shape
        torch.Size([2])
    """

    pooled: Mapping[str, tuple[Scores, ...]]
    unpooled: Scores
    start_layers: tuple[int, ...]
    layer: int | None
    how: str
    reduction: float

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.unpooled.tasks

    def accuracy(self, spans: str = "constituents") -> Float[Tensor, " start"]:
        """Return the accuracy for each start layer, over distinct queries of all tasks."""
        return torch.tensor([scores.accuracy for scores in self.pooled[spans]])

    def relative_drop(self, spans: str = "constituents") -> Float[Tensor, " start"]:
        """Return the share of the unpooled accuracy that is lost, for each start layer.

        It is NaN where nothing was right without pooling.
        """
        return 1 - self.accuracy(spans) / (self.unpooled.accuracy or torch.nan)

    def comparison(self, start_layer: int) -> Comparison:
        """Return the paired differences from the unpooled prompts and from random spans.

        Raises:
            ValueError: If pooling was not started there.
        """
        at = layer_index(self.start_layers, start_layer)
        others = {name: scores[at] for name, scores in self.pooled.items()}
        return compare(others.pop("constituents"), {**others, "unpooled": self.unpooled})

    def to_frame(self) -> pd.DataFrame:
        """Return one row per kind of spans, start layer and task.

        The columns are ``accuracy, low, high`` (Wilson's 95 % interval), ``unpooled`` accuracy,
        ``relative_drop, drop_low, drop_high`` (Tango's interval of the paired difference, over the
        unpooled accuracy), ``loss``, with several tasks ``decoded, decoded_low, decoded_high,
        decoded_unpooled``, and ``n, n_distinct``.
        """
        rows = []
        for name, several in self.pooled.items():
            for start, scores in zip(self.start_layers, several, strict=True):
                paired = compare(scores, self.unpooled).to_frame()
                for row in paired.to_dict("records"):
                    own, before = scores.of(row["task"]), row["other"] or torch.nan
                    found = {"spans": name, "start_layer": start, "task": row["task"]}
                    found["accuracy"] = row["accuracy"]
                    found["low"], found["high"] = row["accuracy_low"], row["accuracy_high"]
                    found["unpooled"] = row["other"]
                    found["relative_drop"] = -row["difference"] / before
                    found["drop_low"] = -row["high"] / before
                    found["drop_high"] = -row["low"] / before
                    found["loss"] = own.mean_loss
                    if "decoded" in own.metrics:
                        found["decoded"] = own.mean("decoded")
                        found["decoded_low"], found["decoded_high"] = _decoded_interval(own)
                        found["decoded_unpooled"] = self.unpooled.of(row["task"]).mean("decoded")
                    rows.append({**found, "n": row["n"], "n_distinct": row["n_distinct"]})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        drops = self.relative_drop()
        worst = int(drops.nan_to_num(-torch.inf).argmax())
        control = ""
        if CONTROL in self.pooled:
            control = f", random spans {float(self.relative_drop(CONTROL)[worst]):+.2f}"
        return (
            f"PoolingRobustness({self.how} from layers {list(self.start_layers)}, accuracy "
            f"{self.unpooled.accuracy:.2f} unpooled; largest relative drop "
            f"{float(drops[worst]):+.2f}, from layer {self.start_layers[worst]}{control}; "
            f"{self.reduction:.0%} fewer states; "
            f"{self.unpooled.size})"
        )


def pooling_robustness(
    model: Any,
    episodes: Sequence[AnyEpisode],
    spans: Spans = "words",
    *,
    start_layers: Sequence[int] | None = None,
    how: str = "mean",
    control: bool = True,
    layer: int | None = None,
    k: int = 10,
    seed: int = 0,
    max_tokens: int | None = None,
    progress: bool = False,
) -> PoolingRobustness:
    """Return accuracy and decodability with constituents pooled from each start layer on.

    Before block ``start_layer`` and every later one, the residual streams of a constituent's tokens
    are replaced by their mean, in the prompt only. A token belongs to the constituent that holds
    its last character; a BOS belongs to none. Each start layer takes a pass over whole prompts.

    Args:
        model: Any model with TransformerLens' hook API and a fast tokenizer.
        episodes: Few-shot episodes.
        spans: ``"words"`` for runs of letters and digits; or the constituents of each episode's
            prompt, as (begin, end) in characters, in order and without overlap; or a function from
            an episode to them.
        start_layers: The layers before which pooling starts, counted from 0; None for all.
        how: ``"mean"``, ``"max"`` or ``"sum"``, by dimension.
        control: Whether to pool random spans too: as many as there are constituents, of the same
            numbers of tokens. The first and the last token of a prompt stay alone where they are
            in no constituent of several tokens.
        layer: The layer after which the last token's state is decoded; by default the one where
            the task is decoded best without pooling. Pooling that starts above it changes nothing.
        k: The number of neighbours that vote, as for :func:`task_decodability`.
        seed: Seed of the random spans.
        max_tokens: As for :func:`evaluate`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If ``spans`` or ``how`` is unknown, spans overlap or leave the prompt, no
            constituent has several tokens, a layer does not exist, or as for :func:`evaluate` and
            :func:`task_decodability`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 6, 4, seed=0)
        >>> found = pooling_robustness(model, episodes, start_layers=[0, 3], k=5)
        >>> bool(found.accuracy()[0] < found.unpooled.accuracy)
        True
    """
    if how not in _HOW:
        raise ValueError(f"how is {how!r}; it must be one of {list(_HOW)}")
    if not episodes:
        raise ValueError("episodes is empty; give at least one episode")
    starts = check_layers(model, start_layers, "resid_pre")
    if layer is not None:
        check_layers(model, [layer])
    tokens = token_spans(model, episodes)
    groups = [
        _in_tokens(own, of_episode)
        for own, of_episode in zip(tokens, _constituents(episodes, spans), strict=True)
    ]
    if not any(groups):
        raise ValueError(
            "no constituent has several tokens, so pooling changes nothing; give spans of phrases, "
            "or tasks with longer words"
        )
    lengths = list(map(len, tokens))
    kinds = {"constituents": groups}
    if control:
        rng = random.Random(seed)
        kinds[CONTROL] = [
            _elsewhere(own, length, rng) for own, length in zip(groups, lengths, strict=True)
        ]
    several = len({episode.task for episode in episodes}) > 1
    options: dict[str, Any] = {"max_tokens": max_tokens}
    observe = Observe(layers=None if layer is None else [layer])
    found, [unpooled] = evaluate_many(model, episodes, [[]], observe=observe, **options)
    if several:
        decodability = task_decodability(found, k)
        layer = decodability.best_layer()
        unpooled = _with(unpooled, decodability.hits[layer_index(found.layers, layer)])
    names = [hook_name("resid_pre", one) for one in range(int(model.cfg.n_layers))]
    pooled: dict[str, tuple[Scores, ...]] = {}
    with tqdm(total=len(kinds) * len(starts), disable=not progress, leave=False) as bar:
        for kind, own in kinds.items():
            from_end = [
                [(begin - length, end - length) for begin, end in some]
                for some, length in zip(own, lengths, strict=True)
            ]
            of_start = []
            for start in starts:
                pools = [
                    PromptHook(name, partial(_pooling, from_end, how)) for name in names[start:]
                ]
                states = torch.zeros(len(episodes), found.values.shape[2])
                reads = PromptHook(hook_name("resid_post", layer or 0), partial(_reading, states))
                scores = evaluate(model, episodes, [*pools, reads], **options)
                if several:
                    scores = _with(scores, readout("knn", k)(states, scores.labels).float())
                of_start.append(scores)
                bar.update()
            pooled[kind] = tuple(of_start)
    spared = [sum(end - begin - 1 for begin, end in own) for own in groups]
    reduction = sum(one / length for one, length in zip(spared, lengths, strict=True)) / len(tokens)
    return PoolingRobustness(pooled, unpooled, starts, layer if several else None, how, reduction)


def _constituents(episodes: Sequence[Any], spans: Spans) -> list[list[Span]]:
    """Return the constituents of each prompt, in characters."""
    if isinstance(spans, str):
        if spans != "words":
            raise ValueError(
                f"spans is {spans!r}; it must be 'words', a list of spans for each episode, or a "
                "function from an episode to its spans"
            )
        if not isinstance(episodes[0].prompt, str):
            raise ValueError(
                "prompts of vectors have no words; give spans of each episode's tokens"
            )
        found = [[word.span() for word in _WORD.finditer(one.prompt)] for one in episodes]
    elif callable(spans):
        found = [list(spans(episode)) for episode in episodes]
    else:
        found = [list(own) for own in spans]
    if len(found) != len(episodes):
        raise ValueError(f"there are spans of {len(found)} prompts, and {len(episodes)} episodes")
    for episode, own in zip(episodes, found, strict=True):
        before = 0
        for begin, end in own:
            if not before <= begin < end <= len(episode.prompt):
                raise ValueError(
                    f"span {(begin, end)} is empty, overlaps the one before, or leaves the prompt "
                    f"of length {len(episode.prompt)}; give spans in order"
                )
            before = end
    return found


def _in_tokens(tokens: Sequence[Span], spans: Sequence[Span]) -> list[Span]:
    """Return the spans of several tokens, in tokens."""
    owners = tokens_in(tokens, spans)
    places: dict[int, list[int]] = {}
    for at, owner in enumerate(owners):
        if owner is not None:
            places.setdefault(owner, []).append(at)
    return [(own[0], own[-1] + 1) for own in places.values() if len(own) > 1]


def _elsewhere(spans: Sequence[Span], length: int, rng: random.Random) -> list[Span]:
    """Return as many spans of the same lengths at random places, without overlap."""
    if not spans:
        return []
    first, last = int(spans[0][0] > 0), int(spans[-1][1] < length)
    sizes = [end - begin for begin, end in spans]
    blocks = [*sizes, *[1] * (length - sum(sizes) - first - last)]
    rng.shuffle(blocks)
    found, at = [], first
    for size in blocks:
        if size > 1:
            found.append((at, at + size))
        at += size
    return found


def _pooling(
    spans: Sequence[Sequence[Span]], how: str, batch: PromptBatch
) -> Callable[..., Tensor]:
    """Return a hook function that pools each prompt's own spans, counted from its end."""
    width, device = batch.tokens.shape[1], batch.tokens.device
    cells = [
        (row, width + at, (row, begin))
        for row, prompt in enumerate(batch.rows)
        for begin, end in spans[prompt]
        for at in range(begin, end)
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(key for *_, key in cells))}
    rows, columns, owners = (
        torch.tensor(one, dtype=torch.long, device=device)
        for one in (
            [row for row, *_ in cells],
            [column for _, column, _ in cells],
            [numbers[key] for *_, key in cells],
        )
    )

    def hook_function(activation: Tensor, hook: Any = None) -> Tensor:
        states = activation[rows, columns].float()
        places = repeat(owners, "cell -> cell d", d=states.shape[1])
        pooled = states.new_zeros(len(numbers), states.shape[1])
        pooled.scatter_reduce_(0, places, states, _HOW[how], include_self=False)
        edited = activation.clone()
        edited[rows, columns] = pooled[owners].to(activation.dtype)
        return edited

    return hook_function


def _reading(states: Float[Tensor, "example d_model"], batch: PromptBatch) -> Callable[..., None]:
    """Return a hook function that writes the last prompt token's activations to ``states``."""
    last = batch.tokens.shape[1] - 1

    def hook_function(activation: Tensor, hook: Any = None) -> None:
        states[list(batch.rows)] = activation[:, last].detach().to("cpu", torch.float32)

    return hook_function


def _with(scores: Scores, decoded: Float[Tensor, " example"]) -> Scores:
    return replace(scores, metrics={**scores.metrics, "decoded": decoded})


def _decoded_interval(scores: Scores) -> tuple[float, float]:
    low, high = share_interval(scores.metrics["decoded"], scores.queries, scores.demo_sets)
    return float(low), float(high)
