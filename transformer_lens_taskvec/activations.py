"""Activations of many prompts at one position, such as the residual stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.carried import warn_of_hooks
from transformer_lens_taskvec.models.forward import run_until
from transformer_lens_taskvec.models.layouts import check_readable
from transformer_lens_taskvec.models.limits import check_lengths
from transformer_lens_taskvec.models.past import Past
from transformer_lens_taskvec.models.prefixes import fewest_saved, in_steps, steps
from transformer_lens_taskvec.models.protocol import (
    fingerprint,
    inference,
    model_name,
    revision,
)
from transformer_lens_taskvec.models.tokens import (
    PromptBatch,
    as_position,
    encode_prompts,
    row_indices,
)
from transformer_lens_taskvec.prompts import AnyEpisode, demo_sets_of

_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Source:
    """Where activations and vectors come from; those that are compared must agree in it.

    Attributes:
        model: The model's name.
        hook: The hook point within a block.
        position: The position of the prompt, -1 its last token.
        template: The example pattern of the prompt template.
        bos: Whether a beginning-of-sequence token preceded the prompt.
        mode: The default mode of injecting the vectors.
        heads: The heads summed in a function vector, as (layer, head).
        weights: A fingerprint of the model's weights; None where it is not known.
        revision: The commit of the weights on the model hub; None where it is not known.
        seed: The seed the episodes were sampled with; None for several or where it is not known.
        n: The numbers of episodes per task, ascending: ``(40,)`` if all tasks have 40.
        n_shots: The numbers of demonstrations per episode, ascending.
    """

    model: str
    hook: str
    position: int
    template: str
    bos: bool
    mode: str = "replace"
    heads: tuple[tuple[int, int], ...] = ()
    weights: str | None = None
    revision: str | None = None
    seed: int | None = None
    n: tuple[int, ...] = ()
    n_shots: tuple[int, ...] = ()


def source_of(model: Any, episodes: Sequence[AnyEpisode], **fields: Any) -> Source:
    """Return the source of what comes from a model and episodes; ``fields`` as for ``Source``."""
    seeds = {getattr(episode, "seed", None) for episode in episodes}
    return Source(
        model=model_name(model),
        template=" | ".join(sorted({episode.template.example for episode in episodes})),
        weights=fingerprint(model),
        revision=revision(model),
        seed=seeds.pop() if len(seeds) == 1 else None,
        n=tuple(sorted(set(Counter(episode.task for episode in episodes).values()))),
        n_shots=tuple(sorted({episode.n_shots for episode in episodes})),
        **fields,
    )


@dataclass(frozen=True)
class Observe:
    """What :func:`evaluate_many` keeps of the unedited pass, at the last prompt token.

    Attributes:
        hook: The hook point within a block, as TransformerLens names it.
        layers: The layers, counted from 0; None for all.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> observe = tv.Observe("attn_out", layers=[1])
        >>> activations, [scores] = tv.evaluate_many(model, episodes, [[]], observe=observe)
        >>> activations.values.shape
        torch.Size([60, 1, 64])
    """

    hook: str = "resid_post"
    layers: Sequence[int] | None = None


@dataclass(frozen=True, repr=False)
class Activations:
    """Activations of episodes at one position, with their tasks.

    Attributes:
        values: ``[example, layer, d_model]``, float32 on the CPU (``[example, layer, head, d]``
            for a hook point with a head axis).
        labels: ``[example]`` indices into ``tasks``.
        tasks: The tasks' names, in order of first appearance.
        layers: The layers of the second axis, counted from 0.
        source: Where the activations come from.
        queries: ``[example]``, equal where episodes ask the same query; None if all differ.
        demo_sets: ``[example]``, equal where episodes share their demonstrations; None where all
            demonstrations are fresh, or there are none.
        inputs: ``[example]``, equal where queries have the same input, whatever the task; None
            where that is not known.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> activations = tv.collect(tv.load_model("toy"), episodes)
        >>> activations.at(1).shape, activations.tasks[activations.labels[0]]
        (torch.Size([60, 64]), 'AND')
    """

    values: Float[Tensor, "example layer ..."]
    labels: Int[Tensor, " example"]
    tasks: tuple[str, ...]
    layers: tuple[int, ...]
    source: Source
    queries: Int[Tensor, " example"] | None = None
    demo_sets: Int[Tensor, " example"] | None = None
    inputs: Int[Tensor, " example"] | None = None

    @property
    def hook(self) -> str:
        """The hook point within a block."""
        return self.source.hook

    def at(self, layer: int) -> Float[Tensor, " example *rest"]:
        """Return the activations of one layer, by its number in the model.

        Raises:
            ValueError: If the layer was not collected.
        """
        return self.values[:, layer_index(self.layers, layer)]

    def select(self, rows: Int[Tensor, " row"]) -> Activations:
        """Return the activations of some examples, by their indices; all tasks stay listed."""
        return replace(
            self,
            values=self.values[rows],
            labels=self.labels[rows],
            queries=None if self.queries is None else self.queries[rows],
            demo_sets=None if self.demo_sets is None else self.demo_sets[rows],
            inputs=None if self.inputs is None else self.inputs[rows],
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.values.shape)
        return (
            f"Activations({shape} [example, layer, d_model] at {self.hook} of {self.source.model}, "
            f"tasks: {', '.join(self.tasks)})"
        )


def collect(
    model: Any,
    episodes: Sequence[AnyEpisode],
    *,
    hook: str = "resid_post",
    layers: Sequence[int] | None = None,
    position: int = -1,
    batch_size: int | None = None,
    progress: bool = False,
) -> Activations:
    """Return the activations of episodes' prompts, without their answers.

    The default is the residual stream after each block at the last prompt token: the paper's
    representation *h* (Han et al. 2025, section 4). A pass ends after the last layer asked for, and
    nothing else is kept.

    Args:
        model: Any model with TransformerLens' hook API.
        episodes: The episodes; their order is kept.
        hook: The hook point within a block, as TransformerLens names it.
        layers: The layers, counted from 0; None for all.
        position: The position in the prompt, -1 its last token.
        batch_size: Prompts per pass; by default about 4,000 tokens.
        progress: Whether to show a progress bar.

    Returns:
        The activations, ``[example, layer, d_model]``.

    Raises:
        ValueError: If there are no episodes, a layer or hook point does not exist, a layer is named
            twice, the hook point's activation is not ``[batch, pos, ...]`` (``pattern``), a prompt
            has no tokens or no such position, or the model has no tokenizer for texts or no BOS for
            a template that asks for one.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> tv.collect(model, episodes).values.shape  # [example, layer, d_model]
        torch.Size([60, 4, 64])
        >>> tv.collect(model, episodes, hook="attn_out", layers=[1]).values.shape
        torch.Size([60, 1, 64])
    """
    if not episodes:
        raise ValueError("episodes is empty; give at least one episode")
    at = as_position(position)
    if not isinstance(at, int):
        raise ValueError(f"position is {position!r}; activations are of one position, such as -1")
    chosen, names = check_readable(model, layers, hook)
    encoded, bos = encode_prompts(model, episodes)
    check_lengths(model, encoded)
    lengths = list(map(len, encoded))
    longest = max(lengths)
    row_indices(at, lengths, longest)  # or there is no such position
    from_end = [at if at < 0 else at - length for length in lengths]
    values: Tensor | None = None
    with inference(model), tqdm(total=len(encoded), disable=not progress, leave=False) as bar:
        can = capabilities(model)
        if can.hooked:
            warn_of_hooks(model, stacklevel=2)
        plan = steps(
            encoded,
            budget=(batch_size or max(1, _TOKENS_PER_BATCH // longest)) * longest,
            can=can,
            own=[-one for one in from_end],
            fewest=fewest_saved(model),
            most_rows=batch_size,
        )
        for batch, past in in_steps(model, plan):
            ends = [from_end[row] for row in batch.rows]
            kept = read_prompts(model, batch, names, ends, past=past)
            if values is None:
                values = torch.empty(len(encoded), *kept.shape[1:])
            values[list(batch.rows)] = kept.to("cpu", torch.float32)
            bar.update(len(batch.rows))
    assert values is not None
    return labelled(model, episodes, values, hook=hook, layers=chosen, position=at, bos=bos)


def labelled(
    model: Any,
    episodes: Sequence[AnyEpisode],
    values: Float[Tensor, "example layer ..."],
    *,
    hook: str,
    layers: Sequence[int],
    bos: bool,
    position: int = -1,
) -> Activations:
    """Return activations together with their tasks and source."""
    tasks, labels = label(episodes)
    source = source_of(model, episodes, hook=hook, position=position, bos=bos)
    queries = torch.tensor([episode.query_id for episode in episodes])
    sets = demo_sets_of(episodes)
    known = [getattr(episode, "input_id", None) for episode in episodes]
    inputs = None if None in known else torch.tensor(known)
    return Activations(values, labels, tasks, tuple(layers), source, queries, sets, inputs)


def read_prompts(
    model: Any,
    batch: PromptBatch,
    names: Sequence[str],
    ends: int | Sequence[int] = -1,
    *,
    past: Past | None = None,
) -> Float[Tensor, "row layer ..."]:
    """Return a batch's activations at one position of each prompt.

    Args:
        model: Any model with TransformerLens' hook API.
        batch: Prompts without their answers, on the model's device.
        names: Full names of hook points, in the order of the second axis.
        ends: The positions, counted from the prompts' ends: -1 is the last token.
        past: What stands before the batch's tokens.
    """
    width = batch.tokens.shape[1]
    several = {ends} if isinstance(ends, int) else set(ends)
    at = width + several.pop() if len(several) == 1 else width + torch.tensor(ends)
    reader = Reader(names, at if isinstance(at, int) else at.to(batch.tokens.device))
    layers = [int(name.split(".")[1]) for name in names]
    deepest = names[max(range(len(names)), key=layers.__getitem__)]
    run_until(model, batch.tokens, batch.padding, reader.hooks, deepest, past=past)
    found = reader.take()
    assert found is not None
    return found


class Reader:
    """Hook functions that keep the activations at one position of each row."""

    def __init__(self, names: Sequence[str], at: Int[Tensor, " row"] | int) -> None:
        """Read the hook points ``names`` at column ``at``, the same for all rows or one each."""
        self._at = at
        self._names = names
        self._kept: dict[str, Tensor] = {}

    @property
    def hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """Pairs for ``fwd_hooks``."""
        return [(name, partial(self._keep, name)) for name in self._names]

    def take(self) -> Float[Tensor, "row layer ..."] | None:
        """Return the activations by hook point, where the model is; None if there are none."""
        if not self._names:
            return None
        return torch.stack([self._kept[name] for name in self._names], dim=1)

    def _keep(self, name: str, activation: Tensor, hook: Any = None) -> None:
        if isinstance(self._at, int):
            kept = activation[:, self._at]
        else:
            kept = activation[torch.arange(len(activation), device=activation.device), self._at]
        self._kept[name] = kept.detach().clone()


def label(episodes: Sequence[AnyEpisode]) -> tuple[tuple[str, ...], Int[Tensor, " example"]]:
    """Return the episodes' tasks in order of first appearance, and each episode's index in them."""
    tasks = tuple(dict.fromkeys(episode.task for episode in episodes))
    index = {task: number for number, task in enumerate(tasks)}
    return tasks, torch.tensor([index[episode.task] for episode in episodes])


def check_finite(activations: Activations) -> None:
    """Raise ``ValueError`` if an activation is NaN or infinite."""
    finite = torch.isfinite(activations.values)
    finite = rearrange(finite, "example layer ... -> example layer (...)").all(dim=2)
    if not bool(finite.all()):
        bad = [
            layer for layer, own in zip(activations.layers, finite.T, strict=True) if not own.all()
        ]
        raise ValueError(
            f"activations contains NaN or infinite values at layers {bad}, in "
            f"{int((~finite.all(dim=1)).sum())} of {len(activations)} examples; check the model's "
            "dtype, or collect other layers"
        )


def layer_index(layers: Sequence[int | None], layer: int | None) -> int:
    """Return the index of a layer on the layer axis.

    Raises:
        ValueError: If it is not there.
    """
    if layer not in layers:
        raise ValueError(f"layer {layer} is not among the layers {list(layers)}; use one of them")
    return list(layers).index(layer)
