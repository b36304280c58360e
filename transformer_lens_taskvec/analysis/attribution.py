"""Which demonstrations wrote a task vector.

What an attention head adds to the residual stream at the last token is, through its part of
``W_O``, the sum over positions of its pattern times the values there. So what heads add together
splits exactly into what comes from each demonstration, from the query, and from what stands before
the demonstrations. Ren & Liu (2023, arXiv 2310.13220) read the demonstrations' part as the step of
gradient descent that a head takes on its examples, from a model that the query alone gives.

Values are those of the layer's own input: a head that reads at one demonstration what an earlier
layer moved there from another counts it as the first one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.frames import grid_frame
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec._utils.statistics import change_interval, means_by_query
from transformer_lens_taskvec._utils.text import spelled_size
from transformer_lens_taskvec.activations import Activations, check_finite, collect
from transformer_lens_taskvec.models.layouts import check_readable, position_shapes
from transformer_lens_taskvec.models.protocol import check_layers
from transformer_lens_taskvec.prompts import AnyEpisode
from transformer_lens_taskvec.vectors.base import TaskVectors, check_tasks, check_vectors
from transformer_lens_taskvec.vectors.means import task_means
from transformer_lens_taskvec.vectors.outputs import multipliers, w_o
from transformer_lens_taskvec.vectors.split import (
    part_names,
    parts_of_tokens,
    split_heads,
)


@dataclass(frozen=True, repr=False)
class Attribution(Shown):
    """What each part of the prompt wrote of what heads add at the last token.

    The parts are ``before`` (a BOS, the instruction), each demonstration, and the query.

    Attributes:
        norms: ``[example, head, part]``, the norm of what a head adds from a part.
        projections: ``[example, head, part]``, the same along the direction of the example's task;
            minus the mean over tasks if ``centred``.
        attention: ``[example, head, part]``, the share of the head's attention that goes to a part.
        tokens: ``[example, part]``, the share of the prompt's tokens in a part.
        written: ``[task, layer, part, d_model]``, what the heads of a layer add from a part, in the
            mean over the task's examples. The parts sum to the heads' outputs.
        bias: ``[task, layer, d_model]``, what attention adds besides its heads; with all heads of a
            layer, ``written`` summed over parts plus this is the mean ``attn_out``.
        directions: ``[task, d_model]``, of length one.
        heads: The heads, as (layer, head).
        whole: ``[example, 1, d_model]``, what the heads add together.
        centred: Whether directions and projections are minus their mean over tasks.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> found = attribute_demonstrations(model, episodes, 1, centred=True)
        >>> found.shares.shape, bool(found.of_demonstrations.min() > 0.5)  # [task, part]
        (torch.Size([6, 6]), True)
    """

    norms: Float[Tensor, "example head part"]
    projections: Float[Tensor, "example head part"]
    attention: Float[Tensor, "example head part"]
    tokens: Float[Tensor, "example part"]
    written: Float[Tensor, "task layer part d_model"]
    bias: Float[Tensor, "task layer d_model"]
    directions: Float[Tensor, "task d_model"]
    heads: tuple[tuple[int, int], ...]
    whole: Activations
    centred: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.whole.tasks

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the heads, counted from 0."""
        return tuple(sorted({layer for layer, _ in self.heads}))

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts, in the order of the prompt."""
        return part_names(self.norms.shape[2] - 2)

    @property
    def by_head(self) -> Float[Tensor, "task head part"]:
        """``[task, head, part]``, the share of the vector: over all heads and parts the sum is 1.

        It is the mean projection over distinct queries, divided by that of the whole.
        """
        mean = self._mean(self.projections)
        return mean / reduce(mean, "task head part -> task 1 1", "sum")

    @property
    def by_layer(self) -> Float[Tensor, "task layer part"]:
        """``[task, layer, part]``, the share that the heads of each layer wrote."""
        return self._of_layers(self.by_head)

    @property
    def shares(self) -> Float[Tensor, "task part"]:
        """``[task, part]``, the share of the vector that each part wrote; parts sum to 1."""
        return reduce(self.by_head, "task head part -> task part", "sum")

    @property
    def of_demonstrations(self) -> Float[Tensor, " task"]:
        """``[task]``, the share of the vector that all demonstrations wrote together."""
        return reduce(self.shares[:, 1:-1], "task part -> task", "sum")

    def intervals(self, confidence: float = 0.95) -> Float[Tensor, "task part 2"]:
        """Return the intervals of the shares, over distinct queries.

        They are Student's with a correction for skewness, for the whole as it is.
        """
        totals = reduce(self.projections, "example head part -> example part", "sum").double()
        whole = reduce(self._mean(self.projections), "task head part -> task", "sum")
        found = []
        for task, rows in enumerate(self._rows()):
            sets = None if self.whole.demo_sets is None else self.whole.demo_sets[rows]
            shares = (totals[rows] / whole[task]).T
            found.append(change_interval(shares, self._queries[rows], sets, confidence))
        return torch.stack(found)

    def to_frame(self, by: str = "part") -> pd.DataFrame:
        """Return one row per task and part, and ``by="layer"`` or ``"head"`` per layer or head too.

        The columns are ``share`` (by part with ``low`` and ``high``, its 95 % interval),
        ``projection``, which is not divided by the whole's and compares with that of other prompts,
        ``norm`` of what was written (a mean vector's by part and layer, the mean over prompts by
        head), ``attention`` and ``tokens`` (the share of attention and of tokens that the part has,
        to compare with), ``n`` and ``n_distinct``.

        Raises:
            ValueError: If ``by`` is none of these.
        """
        attention, along = self._mean(self.attention), self._mean(self.projections)
        axes: dict[str, Sequence[Any]] = {"task": self.tasks}
        columns: dict[str, Tensor] = {}
        if by == "part":
            axes["part"] = self.parts
            low, high = self.intervals().unbind(dim=-1)
            columns = {"share": self.shares, "low": low, "high": high}
            columns["projection"] = reduce(along, "task head part -> task part", "sum")
            columns["norm"] = reduce(self.written, "t layer p d -> t p d", "sum").norm(dim=-1)
            columns["attention"] = reduce(attention, "task head part -> task part", "mean")
        elif by == "layer":
            axes |= {"layer": self.layers, "part": self.parts}
            columns = {"share": self.by_layer, "projection": self._of_layers(along)}
            columns["norm"] = self.written.norm(dim=-1)
            heads = torch.tensor([layer for layer, _ in self.heads])
            per_layer = torch.tensor([int((heads == layer).sum()) for layer in self.layers])
            columns["attention"] = self._of_layers(attention) / per_layer[None, :, None]
        elif by == "head":
            axes |= {"head": self.heads, "part": self.parts}
            columns = {"share": self.by_head, "projection": along}
            columns |= {"norm": self._mean(self.norms), "attention": attention}
        else:
            raise ValueError(f"by is {by!r}; it must be 'part', 'layer' or 'head'")
        tokens = self._mean(self.tokens)
        columns["tokens"] = tokens if by == "part" else tokens[:, None]
        frame = grid_frame(axes, columns)
        for name, index in (("n", 0), ("n_distinct", 1)):
            sizes = {
                task: size[index] for task, size in zip(self.tasks, self._sizes(), strict=True)
            }
            frame[name] = frame["task"].map(sizes)
        if by == "head":
            frame.insert(1, "layer", [layer for layer, _ in frame["head"]])
            frame["head"] = [head for _, head in frame["head"]]
        return frame

    @property
    def _queries(self) -> Tensor:
        queries = self.whole.queries
        return torch.arange(len(self.whole)) if queries is None else queries

    def _sizes(self) -> list[tuple[int, int]]:
        """Return each task's numbers of examples and of distinct queries."""
        rows = self._rows()
        return [(int(some.sum()), len(self._queries[some].unique())) for some in rows]

    def _rows(self) -> list[Tensor]:
        return [self.whole.labels == task for task in range(len(self.tasks))]

    def _mean(self, values: Float[Tensor, "example ..."]) -> Float[Tensor, "task ..."]:
        """Return each task's mean over distinct queries."""
        means = []
        for rows in self._rows():
            flat = values[rows].flatten(1).T
            mean = means_by_query(flat, self._queries[rows]).mean(dim=-1)
            means.append(mean.unflatten(0, values.shape[1:]))
        return torch.stack(means)

    def _of_layers(self, by_head: Float[Tensor, "task head part"]) -> Tensor:
        places = torch.tensor([self.layers.index(layer) for layer, _ in self.heads])
        shape = by_head.shape[0], len(self.layers), by_head.shape[2]
        return by_head.new_zeros(shape).index_add(1, places, by_head)

    def __repr__(self) -> str:
        shares = self.shares.mean(dim=0).tolist()
        examples, queries = zip(*self._sizes(), strict=True)
        size = spelled_size(queries, examples)
        what = "of what tells tasks apart" if self.centred else "of the vector"
        return (
            f"Attribution({len(self.heads)} heads, {len(self.tasks)} tasks; share {what}: "
            f"{len(shares) - 2} demonstrations {sum(shares[1:-1]):.2f}, query {shares[-1]:.2f}, "
            f"before {shares[0]:.2f}; {size})"
        )


def attribute_demonstrations(
    model: Any,
    episodes: Sequence[AnyEpisode],
    layer: int | None = None,
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    vectors: TaskVectors | None = None,
    centred: bool = False,
    batch_size: int = 16,
    progress: bool = False,
) -> Attribution:
    """Return which part of the prompt wrote what heads add at the last token.

    The share of a part is the projection of what comes from it on the direction of the task
    vector, divided by that of the whole.

    A token that is merged across a boundary belongs to the part of its last character. Where no BOS
    stands before the prompt, its first token, on which idle heads rest, is the first
    demonstration's.

    Args:
        model: A model whose attention has ``W_O`` and the hook points ``z``, ``v``, ``pattern``.
        episodes: Few-shot episodes that all have the same number of demonstrations.
        layer: The heads are all those up to this layer, if none are given; ``vectors`` are taken
            after it.
        heads: The heads, as (layer, head), such as :meth:`HeadEffects.top` gives, or
            ``source.heads`` of function vectors.
        vectors: Task vectors whose directions count; by default what the heads add together, in
            the mean over the task's episodes: with the top heads, the function vector.
        centred: Whether to take vectors and parts minus their means over tasks. Then a share is of
            what tells the task from the others, and what all prompts have in common has none.
        batch_size: Prompts per pass.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If neither ``layer`` nor ``heads`` is given, one does not exist or a head is
            above the layer, ``vectors`` come from another model or lack a task or the layer,
            numbers of demonstrations differ, one task is to be centred, or what attention adds is
            not the sum of its values weighted by the pattern, through ``W_O`` and a norm or a
            multiplier that may follow.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> top = tv.head_effects(model, episodes).top(1)
        >>> found = attribute_demonstrations(model, episodes, heads=top)
        >>> bool((found.shares.sum(dim=1) - 1).abs().max() < 1e-6), found.parts[:2]
        (True, ('before', 'demonstration 0'))
    """
    chosen = _checked_heads(model, layer, heads)
    layers = tuple(sorted({one for one, _ in chosen}))
    tasks = tuple(dict.fromkeys(episode.task for episode in episodes))
    if centred and len(tasks) < 2:
        raise ValueError(f"centred takes the mean over tasks, and there is one: {list(tasks)}")
    if vectors is not None:
        check_vectors(vectors, model, episodes)
        check_tasks(vectors, episodes)
        if layer is None:
            raise ValueError("layer is None; say after which layer to take the vectors")
        vectors.at(layer)
    tokens = torch.stack([one.mean(dim=0) for one in parts_of_tokens(model, episodes)])
    z = collect(model, episodes, hook="z", layers=layers, progress=progress)
    check_finite(z)
    factors = multipliers(model, episodes, z)
    at = {one: [head for of, head in chosen if of == one] for one in layers}
    weights = {one: w_o(model, one)[at[one]] for one in layers}
    whole = torch.zeros(len(z), 1, factors.shape[2])
    for place, one in enumerate(layers):
        own = einsum(z.values[:, place, at[one]], weights[one], "e head d, head d m -> e m")
        whole[:, 0] += factors[:, place] * own
    source = replace(z.source, hook="attn_out", heads=chosen)
    total = replace(z, values=whole, layers=(max(layers),), source=source)
    means = task_means(total)[:, 0]
    if vectors is not None and layer is not None:
        means = torch.stack([vectors[task, layer] for task in tasks]).float()
    if centred:
        means = means - means.mean(dim=0)
    directions = torch.nn.functional.normalize(means, dim=-1)
    counts = torch.bincount(z.labels).double()
    shape = len(z), len(chosen), tokens.shape[1]
    norms, projections, attention = (torch.zeros(shape) for _ in range(3))
    written = torch.zeros(len(tasks), len(layers), shape[2], whole.shape[2], dtype=torch.float64)
    common = torch.zeros(*shape[1:], len(tasks), dtype=torch.float64)
    with tqdm(total=len(z), disable=not progress, leave=False) as bar:
        for split in split_heads(model, episodes, z, batch_size=batch_size, progress=bar.update):
            rows, place = torch.tensor(split.rows), layers.index(split.layer)
            own = torch.tensor([index for index, (of, _) in enumerate(chosen) if of == split.layer])
            of_heads = at[split.layer]
            added = einsum(
                split.z[:, of_heads],
                weights[split.layer],
                "r head part d, head d m -> r head part m",
            )
            added *= factors[rows, place, None, None]
            along = einsum(added, directions, "r head part m, task m -> r head part task")
            cells = rows[:, None], own[None]
            norms[cells], attention[cells] = added.norm(dim=-1), split.attention[:, of_heads]
            labels = z.labels[rows]
            projections[cells] = along[torch.arange(len(rows)), ..., labels]
            weight = 1 / counts[labels]
            summed = reduce(added, "r head part m -> r part m", "sum").double()
            written[:, place].index_add_(0, labels, summed * weight[:, None, None])
            mean = einsum(
                along.double(), weight / len(tasks), "r head part task, r -> head part task"
            )
            common[own] += mean
    if centred:
        projections -= common[..., z.labels].movedim(-1, 0).float()
    biases = [_bias(model, one, whole.shape[2]) for one in layers]
    bias = task_means(replace(z, values=factors * torch.stack(biases)))
    return Attribution(
        *(norms, projections, attention, tokens, written.float(), bias, directions),
        *(chosen, total, centred),
    )


def _checked_heads(
    model: Any, layer: int | None, heads: Sequence[tuple[int, int]] | None
) -> tuple[tuple[int, int], ...]:
    """Return the heads in order of their layers."""
    if layer is not None:
        check_layers(model, [layer], "z")
    if heads is None and layer is None:
        raise ValueError("give a layer, up to which all heads count, or heads=[(layer, head), ...]")
    if heads is not None and not heads:
        raise ValueError("heads is empty; give one (layer, head) or more, or None for all")
    layers = range((layer or 0) + 1) if heads is None else sorted({one for one, _ in heads})
    _, names = check_readable(model, layers, "z")
    shapes = position_shapes(model, names)
    n_heads = shapes[names[0]][0]
    if heads is None:
        return tuple((one, head) for one in layers for head in range(n_heads))
    for one, head in heads:
        if not 0 <= head < n_heads:
            raise ValueError(
                f"head {(one, head)} does not exist; layers have heads 0 to {n_heads - 1}"
            )
        if layer is not None and one > layer:
            raise ValueError(f"head {(one, head)} is above layer {layer}, which it cannot write to")
    if len(set(heads)) < len(heads):
        raise ValueError(f"heads names a head twice: {list(heads)}; name each once")
    return tuple(sorted((int(one), int(head)) for one, head in heads))


def _bias(model: Any, layer: int, width: int) -> Float[Tensor, " d_model"]:
    bias = getattr(model.blocks[layer].attn, "b_O", None)
    return torch.zeros(width) if bias is None else bias.detach().to("cpu", torch.float32)
