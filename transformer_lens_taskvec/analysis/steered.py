"""Continuations steered by a task's vector at several strengths, and where the text breaks down.

A continuation breaks down where it is far less likely than the unsteered one, or repeats itself far
more:

    perplexity(steered) > perplexity_bound * perplexity(unsteered), or
    repetition(steered) > repetition(unsteered) + repetition_bound,

both measured by the model without the vector. Perplexity alone would miss a loop, which a language
model finds likely. A random direction of equal norm at the same places tells what any push does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig

from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.controls import control_vectors
from transformer_lens_taskvec.interventions.generated import (
    Continuations,
    Request,
    continuations,
    request_of,
)
from transformer_lens_taskvec.interventions.intervention import Intervention
from transformer_lens_taskvec.interventions.modes import Mode
from transformer_lens_taskvec.interventions.packed import answer_logits
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.carried import taking_along, warn_of_hooks
from transformer_lens_taskvec.models.decoding import Stop, decoding_of
from transformer_lens_taskvec.models.protocol import inference
from transformer_lens_taskvec.prompts import AnyEpisode, PromptTemplate
from transformer_lens_taskvec.vectors.base import OWN, Injectable, Place, at_place, check_vectors

_PROMPTS = 3
"""The most prompts that are displayed."""

_NGRAM = 3


@dataclass(frozen=True, repr=False)
class Steering(Shown):
    """Continuations of the same prompts at several strengths; made by :func:`steer`.

    Attributes:
        prompts: The prompts' texts.
        scales: The strengths, 0 first: unsteered.
        texts: The continuations, by scale and prompt.
        perplexity: ``[scale, prompt]``, of each continuation's tokens under the unsteered model.
        repetition: ``[scale, prompt]``, the share of a continuation's three-token sequences that it
            had before; 0 without any.
        score: ``[scale, prompt]``, what the scoring function gives; None without one.
        control: The same with a random direction of equal norm; None if it was left out.
        task: The task.
        layer: The layer.
        relative: Whether the scales are in units of the activation's norm.
        perplexity_bound: How many times the unsteered continuation's perplexity is too much.
        repetition_bound: By how much more repetition than the unsteered continuation's is too much.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["OR"]), 10, 4, seed=0)
        >>> vectors, prompts = tv.task_vectors(tv.collect(model, episodes)), ["example:01 11->"]
        >>> found = steer(model, prompts, vectors, 1, scales=(0.5, 1), max_new_tokens=4)
        >>> found.scales, found.perplexity.shape, found.control.proposed <= 1
        ((0.0, 0.5, 1.0), torch.Size([3, 1]), True)
    """

    prompts: tuple[str, ...]
    scales: tuple[float, ...]
    texts: tuple[tuple[str, ...], ...]
    perplexity: Float[Tensor, "scale prompt"]
    repetition: Float[Tensor, "scale prompt"]
    score: Float[Tensor, "scale prompt"] | None
    control: Steering | None
    task: str
    layer: int | None
    relative: bool
    perplexity_bound: float
    repetition_bound: float

    @property
    def broken(self) -> Bool[Tensor, "scale prompt"]:
        """``[scale, prompt]``: whether a continuation breaks down."""
        unlikely = self.perplexity > self.perplexity_bound * self.perplexity[0]
        return unlikely | (self.repetition > self.repetition[0] + self.repetition_bound)

    @property
    def proposed(self) -> float:
        """The largest strength up to which fewer than half of the continuations break down.

        It is 0 if that is none of them. If it is the last, larger ones may do too.
        """
        breaks = self.broken.float().mean(dim=1) >= 0.5
        n_held = int((~breaks).int().cumprod(dim=0).sum())
        return self.scales[n_held - 1]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per prompt and scale.

        Columns: ``prompt, scale, continuation, perplexity, repetition, score, breaks_down``, and
        with a control the last five again as ``random_...``; ``score``
        only with a scoring function.
        """
        rows = []
        for index, prompt in enumerate(self.prompts):
            for number, scale in enumerate(self.scales):
                row = {"prompt": prompt, "scale": scale, **self._row(number, index)}
                if self.control is not None:
                    control = self.control._row(number, index)
                    row |= {f"random_{name}": value for name, value in control.items()}
                rows.append(row)
        return pd.DataFrame(rows)

    def _row(self, number: int, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {
            "continuation": self.texts[number][index],
            "perplexity": float(self.perplexity[number, index]),
            "repetition": float(self.repetition[number, index]),
        }
        if self.score is not None:
            row["score"] = float(self.score[number, index])
        return row | {"breaks_down": bool(self.broken[number, index])}

    @property
    def _heading(self) -> str:
        unit = " of the activation's norm" if self.relative else ""
        found = f"use up to {self.proposed:g}{unit}"
        if self.proposed == self.scales[-1]:
            found += ", the largest tried"
        elif not self.proposed:
            found = f"breaks down at {self.scales[1]:g}{unit}, the smallest tried"
        return f"Steering({self.task} at layer {self.layer}: {found})"

    def __repr__(self) -> str:
        lines = [self._heading]
        for index, prompt in enumerate(self.prompts[:_PROMPTS]):
            lines.append(f"{_one_line(prompt)} ...")
            for number, scale in enumerate(self.scales):
                row = self._row(number, index)
                numbers = f"perplexity {row['perplexity']:8.3g}, repetition {row['repetition']:.2f}"
                if self.score is not None:
                    numbers += f", score {row['score']:.2f}"
                mark = " BREAKS DOWN" if row["breaks_down"] else ""
                lines.append(f"  {scale:5g}  {numbers}{mark}")
                lines.append(f"         {_one_line(row['continuation'])}")
        if len(self.prompts) > _PROMPTS:
            lines.append(f"({len(self.prompts) - _PROMPTS} more prompts: .to_frame())")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [f"<p>{escape(self._heading)}</p>"]
        numbers = ["perplexity", "repetition", *([] if self.score is None else ["score"])]
        heads = ["scale", "steered", *numbers]
        if self.control is not None:
            heads += ["random direction", *numbers]
        head = "".join(f'<th style="text-align:left">{name}</th>' for name in heads)
        for index, prompt in enumerate(self.prompts[:_PROMPTS]):
            rows = []
            for number, scale in enumerate(self.scales):
                cells = [_cell(f"<b>{scale:g}</b>" if scale == self.proposed else f"{scale:g}")]
                sides = [self] if self.control is None or not number else [self, self.control]
                for side in sides:
                    row = side._row(number, index)
                    text = escape(_one_line(row["continuation"]))
                    if row["breaks_down"]:
                        text = f'<span style="opacity:0.6">{text}</span> <b>breaks down</b>'
                    cells.append(_cell(text, "text-align:left; max-width:36em"))
                    cells += [_cell(f"{row[name]:.3g}") for name in numbers]
                rows.append(f"<tr>{''.join(cells)}</tr>")
            parts.append(
                f"<p><i>{escape(_one_line(prompt))}</i> ...</p>"
                f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
            )
        more = len(self.prompts) - _PROMPTS
        if more > 0:
            parts.append(f"<p>{more} more prompts: <code>.to_frame()</code></p>")
        return "".join(parts)


def steer(
    model: Any,
    prompts: Sequence[str | AnyEpisode],
    vectors: Injectable,
    layer: int | None,
    *,
    task: str | None = None,
    scales: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.6),
    relative: bool = True,
    mode: Mode | None = "add",
    position: Place = OWN,
    first: int | None = None,
    decay: float = 1.0,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    config: GenerationConfig | None = None,
    stop: Stop | Sequence[Stop] | None = None,
    template: PromptTemplate | None = None,
    seed: int = 0,
    score: Callable[[str], float] | None = None,
    control: bool = True,
    perplexity_bound: float = 4.0,
    repetition_bound: float = 0.3,
    progress: bool = False,
) -> Steering:
    """Return continuations steered by a task's vector at several strengths, side by side.

    The vector acts on the prompt and on every new token. At every strength a prompt is sampled with
    the same random stream, so that what differs is the vector's doing.

    Args:
        model: The model that the vectors come from.
        prompts: As for :func:`generate`.
        vectors: Task vectors, or anything else that can be injected. Differences, such as
            ``contrast_vectors``, steer better than means, most of which all tasks share.
        layer: The layer, counted from 0.
        task: Whose vector; may be left out if there is one task only.
        scales: The strengths, all positive or all negative; the unsteered text comes first anyway.
        relative: Whether they are in units of the activation's norm, as for :func:`inject`.
        mode: As for :func:`inject`; None for the vectors' own.
        position: As for :func:`inject`; by default where the vectors act by themselves.
        first: As for :func:`generate`, but by default all new tokens.
        decay: As for :func:`generate`.
        max_new_tokens: The most tokens per continuation; 40, or the config's.
        temperature: Of the sampling, 0 for greedy decoding; 0.7, or the config's.
        config: As for :func:`generate`.
        stop: As for :func:`generate`.
        template: As for :func:`generate`.
        seed: Seed of the sampling, and of the random direction.
        score: A function of a continuation's text: how much it does the target task.
        control: Whether to run a random direction of equal norm too.
        perplexity_bound: A continuation breaks down beyond this many times the perplexity of the
            unsteered one.
        repetition_bound: A continuation breaks down if its repetition, a share, is larger than that
            of the unsteered one by more than this.
        progress: Whether to show a progress bar.

    Returns:
        The continuations, what they measure, and the largest strength before they break down.

    Raises:
        ValueError: If a task must be named or is not there, a scale or a bound is out of range, or
            as for :func:`inject` and :func:`generate`.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> options = {"max_new_tokens": 5, "temperature": 0, "control": False}
        >>> prompts = ["example:01011 11010->"]
        >>> steer(model, prompts, vectors, 1, task="OR", scales=(0.5, 2), **options)
        Steering(OR at layer 1: use up to 2 of the activation's norm, the largest tried)
        example:01011 11010-> ...
              0  perplexity     1.45, repetition 0.33
                 10101
            0.5  perplexity     1.48, repetition 0.00
                 11011
              2  perplexity     1.48, repetition 0.00
                 11011
    """
    if task is None and len(vectors.tasks) > 1:
        raise ValueError(f"task is None, and there are {', '.join(vectors.tasks)}; name one")
    task = vectors.tasks[0] if task is None else task
    if task not in vectors.tasks:
        raise ValueError(f"no vector for {task!r}; there are: {', '.join(vectors.tasks)}")
    strengths = sorted({float(scale) for scale in scales} - {0.0}, key=abs)
    signs = {scale > 0 for scale in strengths}
    if len(signs) != 1 or not all(map(isfinite, strengths)):
        raise ValueError(
            f"scales is {list(scales)}; give one strength or more, finite, and all of one sign"
        )
    if perplexity_bound <= 1 or repetition_bound <= 0:
        raise ValueError(
            f"perplexity_bound is {perplexity_bound} and repetition_bound {repetition_bound}; they "
            "must be above 1 and above 0"
        )
    check_vectors(vectors, model, [one for one in prompts if not isinstance(one, str)])
    given = None if config is None else config.max_new_tokens
    decoding = decoding_of(
        model,
        config,
        max_new_tokens=40 if max_new_tokens is None and given is None else max_new_tokens,
        temperature=(0.7 if config is None else 0.0) if temperature is None else temperature,
        seed=seed,
        stop=stop,
    )
    sides = [vectors]
    if control:
        sides.append(control_vectors(vectors, kinds=["random"], seed=seed)["random"])
    options: dict[str, Any] = {"mode": mode, "relative": relative, **at_place(position)}
    variants: list[Variant] = [[]]
    for side in sides:
        variants += [side.inject(task, layer, scale=scale, **options) for scale in strengths]
    requests = [
        request_of(model, prompts, edits, decoding, first=first, decay=decay, template=template)
        for edits in variants
    ]
    with inference(model), taking_along(model, Intervention) as carried:
        if capabilities(model).hooked:
            warn_of_hooks(model, stacklevel=2)
        bar = tqdm(requests, disable=not progress, leave=False)
        found = [continuations(model, request, carried) for request in bar]
        perplexity = _perplexity(model, requests, found, carried)
    repeated, scored = _measured(found, score)
    n = len(strengths)

    def side_of(start: int, other: Steering | None) -> Steering:
        some = [0, *range(start, start + n)]
        return Steering(
            prompts=found[0].prompts,
            scales=(0.0, *strengths),
            texts=tuple(found[index].texts for index in some),
            perplexity=perplexity[some],
            repetition=repeated[some],
            score=None if scored is None else scored[some],
            control=other,
            task=str(task),
            layer=layer,
            relative=relative,
            perplexity_bound=perplexity_bound,
            repetition_bound=repetition_bound,
        )

    return side_of(1, side_of(1 + n, None) if control else None)


def _perplexity(
    model: Any,
    requests: Sequence[Request],
    found: Sequence[Continuations],
    carried: Variant,
) -> Float[Tensor, "variant prompt"]:
    """Return the perplexity of all continuations under the unsteered model."""
    prompts = [ids for request in requests for ids in request.encoded]
    answers = [ids for one in found for ids in one.tokens]
    nll = torch.full((len(answers),), torch.nan)
    for chunk in answer_logits(model, prompts, answers, [carried]):
        nll[list(chunk.rows)] = chunk.nll[:, 0].cpu()
    per_token = nll / torch.tensor([len(ids) for ids in answers])
    return rearrange(per_token.exp(), "(variant prompt) -> variant prompt", variant=len(found))


def _measured(
    found: Sequence[Continuations], score: Callable[[str], float] | None
) -> tuple[Float[Tensor, "variant prompt"], Float[Tensor, "variant prompt"] | None]:
    """Return how much continuations repeat themselves, and their scores."""
    repeated = torch.tensor([[repetition(ids) for ids in one.tokens] for one in found])
    if score is None:
        return repeated, None
    return repeated, torch.tensor([[float(score(text)) for text in one.texts] for one in found])


def repetition(ids: Sequence[int], n: int = _NGRAM) -> float:
    """Return the share of sequences of ``n`` tokens that came before; 0 without any.

    Example:
        >>> repetition([1, 2, 3, 1, 2, 3]), repetition([1, 2])
        (0.25, 0.0)
    """
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _one_line(text: str) -> str:
    return text.replace("\n", "\u21b5")


def _cell(content: str, style: str = "text-align:right") -> str:
    return f'<td style="{style}; vertical-align:top">{content}</td>'
