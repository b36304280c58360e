"""What task vectors promote and demote: vectors read as tokens.

A *state* takes the place of the residual stream and is read as the model reads one (logit lens,
nostalgebraist 2020)::

    logits(v) = W_U norm(v) + b_U

A *difference* is added to the stream, so what is the same for every vector is left out::

    logits(v) = W_U (norm(v) - norm(0))

The norm divides by the length of the vector alone, and in the stream by that of the sum: logits of
a difference order tokens, and their size is that of a vector as long as a typical stream.

The Jacobian lens (Gurnee et al. 2026) reads ``J v`` in the place of ``v``, with ``J`` the mean
effect of a layer on the last one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from einops import rearrange, reduce
from jaxtyping import Float, Num
from torch import Tensor

from transformer_lens_taskvec._utils.frames import grid_frame
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.activations import Source
from transformer_lens_taskvec.controls import control_vectors
from transformer_lens_taskvec.models.lens import ADDED, STATES, Read, stream_reader
from transformer_lens_taskvec.models.protocol import hook_name, model_name
from transformer_lens_taskvec.models.tokens import decode
from transformer_lens_taskvec.vectors.base import Injectable, TaskVectors, check_vectors

LOGIT, JACOBIAN = "logit", "jacobian"
"""The lenses."""

VECTORS = "vectors"
"""The name, next to those of controls, of the vectors themselves."""

PROMOTED, DEMOTED = "+", "-"
"""The signs."""

_BLOCKS_BEFORE = {"resid_pre": -1, "resid_post": 0, "mlp_out": 0}
"""The block, from a vector's own, whose output it is part of: a Jacobian lens reads outputs."""

_ROWS = 64
"""Vectors whose logits are held at once."""


@dataclass(frozen=True, repr=False)
class Vocabulary(Shown):
    """The tokens that vectors promote and demote most, next to those of controls.

    Attributes:
        table: ``task, layer, vector`` (``"vectors"`` or a control's name), ``lens, sign`` (``"+"``
            for the tokens with the highest logits, ``"-"`` for the lowest), ``rank`` (from 1),
            ``id, token, logit, z`` (standard deviations from the vector's mean logit, which can be
            compared between layers and vectors of any length), ``probability`` (NaN for
            differences).
        tasks: The tasks' names.
        layers: The layers, counted from 0.
        vectors: ``"vectors"`` and the controls' names.
        lenses: ``"logit"``, and ``"jacobian"`` if it was given.
        reads: ``"states"`` or ``"differences"``.
        centred: Whether they are minus their mean over tasks.
        source: Where the vectors come from.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> found = vocabulary(vectors, model, layer=[1, 2], k=2)
        >>> found
        Vocabulary(states of 6 tasks at layers 1, 2 by logit lens, next to random)
        >>> len(found.to_frame()) == 6 * 2 * 2 * 2 * 2  # tasks, layers, vectors, signs, ranks
        True
    """

    table: pd.DataFrame
    tasks: tuple[str, ...]
    layers: tuple[int, ...]
    vectors: tuple[str, ...]
    lenses: tuple[str, ...]
    reads: str
    centred: bool
    source: Source

    def tokens(
        self,
        task: str,
        layer: int,
        *,
        vector: str = VECTORS,
        lens: str = LOGIT,
        sign: str = PROMOTED,
    ) -> tuple[str, ...]:
        """Return the tokens of one cell, the strongest first.

        Raises:
            ValueError: If there is no such cell.
        """
        wanted = {"task": task, "layer": layer, "vector": vector, "lens": lens, "sign": sign}
        rows = self.table
        for column, value in wanted.items():
            kept = rows[rows[column] == value]
            if not len(kept):
                known = ", ".join(map(str, rows[column].unique()))
                raise ValueError(f"{column} is {value!r}; there are: {known}")
            rows = kept
        return tuple(rows.token)

    def shared(self, control: str) -> pd.DataFrame:
        """Return ``task, layer, lens, sign, shared``: the share of tokens a control has too.

        Where most are shared, the tokens do not speak for what sets the vectors apart from it.

        Raises:
            ValueError: If there is no such control.
        """
        if control not in self.vectors[1:]:
            raise ValueError(f"control is {control!r}; there are: {', '.join(self.vectors[1:])}")
        cells, k = ["task", "layer", "lens", "sign"], int(self.table["rank"].max())
        some = self.table[self.table.vector.isin([VECTORS, control])]
        distinct = some.groupby(cells, sort=False).id.nunique()
        return (2 - distinct / k).rename("shared").reset_index()

    def to_frame(self) -> pd.DataFrame:
        """Return one row per task, layer, vector, lens, sign and rank."""
        return self.table

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "model": self.source.model,
            "hook": self.source.hook,
            "reads": self.reads,
            "centred": self.centred,
            "tokens": json.loads(self.table.to_json(orient="records")),
        }

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        controls = ", ".join(self.vectors[1:]) or "no control"
        return (
            f"Vocabulary({self.reads} of {len(self.tasks)} tasks at layers {layers} by "
            f"{' and '.join(self.lenses)} lens, next to {controls})"
        )


def vocabulary(
    vectors: Injectable,
    model: Any,
    layer: int | Sequence[int] | None = None,
    *,
    controls: Mapping[str, Injectable] | None = None,
    jacobian: Any = None,
    centred: bool = False,
    k: int = 10,
    seed: int = 0,
) -> Vocabulary:
    """Return the tokens that task vectors promote and demote, by layer, next to controls.

    TransformerLens' ``logit_readout`` makes the logits, where it is there (4.x): the model's own
    final norm, unembedding, and what follows. A vector with the mode ``"replace"`` at the residual
    stream is read as a state; any other, and what attention or an MLP adds, as a difference.

    Args:
        vectors: Task vectors, or anything that injects one vector into the residual stream
            (``resid_pre``, ``resid_mid``, ``resid_post``) or into what is added to it
            (``attn_out``, ``mlp_out``).
        model: The model they come from.
        layer: One or several of the vectors' layers; None for all.
        controls: Other vectors of the same tasks and layers, by name, such as those of
            :func:`control_vectors`; by default random ones of the same length.
        jacobian: A ``transformer_lens.tools.analysis.JacobianLens`` fitted to this model, to read
            the vectors by as well. It reads blocks' outputs, so not ``resid_mid`` and ``attn_out``.
        centred: Read vectors, and each control, minus their mean over tasks, as differences.
            States of all tasks have much in common, which says nothing of any one task.
        k: Tokens per sign.
        seed: Seed of the random control.

    Raises:
        ValueError: If vectors cannot be read in this way (``z``, ``q``, several at once, a mode
            that is a function) or come from another model, the model's logits are not made of its
            last residual stream by ``ln_final`` and ``unembed`` alone, there is no such layer,
            ``k`` is out of range, ``centred`` is asked of one task, a control has not all tasks and
            layers or is read differently, or the Jacobian lens does not suit the model, the hook or
            a layer.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.find_tasks(["XOR", "OR"]), 10, 4, seed=0)
        >>> vectors = tv.task_vectors(tv.collect(model, episodes))
        >>> shuffled = tv.control_vectors(vectors, model, episodes, kinds=["shuffled labels"])
        >>> found = vocabulary(vectors, model, 3, controls=shuffled, k=2)
        >>> sorted(found.tokens("XOR", 3))  # the answers' tokens
        ['0', '1']
    """
    check_vectors(vectors, model)
    own = _as_read(vectors, _layers(vectors, layer), vectors.tasks, centred)
    others = control_vectors(own, kinds=["random"], seed=seed) if controls is None else controls
    if VECTORS in others:
        raise ValueError(f"a control is named {VECTORS!r}, as the vectors are; rename it")
    read = {VECTORS: own}
    for name, control in others.items():
        read[name] = _control(name, control, own, centred and controls is not None)
    lenses = (LOGIT,) if jacobian is None else (LOGIT, JACOBIAN)
    hook = _hook(own.source.hook)
    if jacobian is not None:
        _check_jacobian(jacobian, model, hook, own.layers)
    n_tokens = int(getattr(model.cfg, "d_vocab", 0) or 0)
    _check_vocabulary(model, n_tokens, k)
    difference = own.source.mode == "add"
    logits_of = stream_reader(model, added=hook in ADDED)
    zero = logits_of(own.values.new_zeros(1, own.values.shape[-1])) if difference else 0.0
    found = {
        (name, lens): _extremes(
            lambda rows: logits_of(rows) - zero,
            some.values if lens == LOGIT else _transported(jacobian, some, hook, model),
            k,
            with_probabilities=not difference,
        )
        for name, some in read.items()
        for lens in lenses
    }
    columns = {}
    for index, column in enumerate(("id", "logit", "z", "probability")):
        stacked = torch.stack([one[index] for one in found.values()], dim=2)
        columns[column] = rearrange(
            stacked,
            "task layer (vector lens) sign rank -> task layer vector lens sign rank",
            lens=len(lenses),
        )
    axes = {"task": own.tasks, "layer": own.layers, "vector": tuple(read), "lens": lenses}
    ranks = range(1, k + 1)
    table = grid_frame({**axes, "sign": (PROMOTED, DEMOTED), "rank": ranks}, columns)
    # Special tokens have a text only alone, and others may lose their space there.
    texts = {one: decode(model, [one]) or model.tokenizer.decode([one]) for one in set(table.id)}
    table.insert(list(table).index("id") + 1, "token", table.id.map(texts))
    reads = "differences" if difference else "states"
    names = own.tasks, own.layers, tuple(read), lenses
    return Vocabulary(table, *names, reads, centred, vectors.source)


def _layers(vectors: Injectable, layer: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return the layers asked for, all of the vectors' for None."""
    known = [one for one in vectors.layers if one is not None]
    wanted = known if layer is None else [layer] if isinstance(layer, int) else list(layer)
    missing = [one for one in wanted if one not in known]
    if missing or not wanted:
        raise ValueError(
            f"layer is {layer}; name one or several of the layers that have vectors of their own: "
            f"{known}"
        )
    return tuple(wanted)


def _hook(hook: str) -> str:
    """Return the short name of a hook point whose vectors can be read."""
    for short in (*STATES, *ADDED):
        if hook_name(hook, 0) == hook_name(short, 0):
            return short
    raise ValueError(
        f"the vectors are of the hook {hook!r}, and tokens can be read of the residual stream and "
        f"of what is added to it: {', '.join((*STATES, *ADDED))}. Make vectors at one of these"
    )


def _as_read(
    vectors: Injectable, layers: Sequence[int], tasks: Sequence[str], centred: bool
) -> TaskVectors:
    """Return the vectors as they are read, with mode ``"replace"`` for states, ``"add"`` else."""
    kinds, rows = set(), []
    for task in tasks:
        for layer in layers:
            edits = vectors.inject(task, layer)
            vector = edits[0].vector if len(edits) == 1 else None
            if vector is None or not isinstance(edits[0].mode, str):
                raise ValueError(
                    f"injecting {task} at layer {layer} takes {edits}, and one vector with a named "
                    "mode is needed; give TaskVectors, such as the .vectors of these"
                )
            [edit] = edits
            hook = _hook(edit.hook)
            if edit.head is not None:
                raise ValueError(
                    f"head is {edit.head} at hook {edit.hook!r}; give vectors without a head"
                )
            kinds.add((hook, "replace" if edit.mode == "replace" and hook in STATES else "add"))
            rows.append(vector.detach().to("cpu", torch.float32) * edit.scale)
    if len(kinds) > 1:
        raise ValueError(f"the vectors are of several kinds, {sorted(kinds)}; give those of one")
    [(hook, mode)] = kinds
    values = rearrange(torch.stack(rows), "(task layer) d -> task layer d", task=len(tasks))
    if centred and len(tasks) < 2:
        raise ValueError("centred is True, and there is one task; leave it out, or give more tasks")
    if centred:
        values, mode = values - reduce(values, "task layer d -> 1 layer d", "mean"), "add"
    source = replace(vectors.source, hook=hook, mode=mode)
    return TaskVectors(values, tuple(tasks), tuple(layers), source)


def _control(name: str, control: Injectable, own: TaskVectors, centred: bool) -> TaskVectors:
    missing = [
        *(task for task in own.tasks if task not in control.tasks),
        *(layer for layer in own.layers if layer not in control.layers),
    ]
    if missing:
        raise ValueError(
            f"the control {name!r} has no vectors of {', '.join(map(str, missing))}; make it of "
            "the same tasks and layers"
        )
    found = _as_read(control, own.layers, own.tasks, centred)
    for field in ("model", "hook", "mode"):
        here, there = getattr(found.source, field), getattr(own.source, field)
        if here != there:
            raise ValueError(
                f"the control {name!r} has the {field} {here!r}, and the vectors {there!r}; give "
                "controls that are read as the vectors are"
            )
    return found


def _check_vocabulary(model: Any, n_tokens: int, k: int) -> None:
    if not n_tokens or getattr(model, "tokenizer", None) is None:
        raise ValueError(
            f"{model_name(model)} has no tokens with texts, so there is nothing to read vectors "
            "as; give a language model with its tokenizer"
        )
    if not 1 <= k <= n_tokens // 2:
        raise ValueError(
            f"k is {k}; it must be from 1 to half the {n_tokens} tokens of {model_name(model)}"
        )


def _check_jacobian(jacobian: Any, model: Any, hook: str, layers: Sequence[int]) -> None:
    if hook not in _BLOCKS_BEFORE:
        raise ValueError(
            f"a Jacobian lens reads blocks' outputs, and {hook!r} is followed by a part of its "
            f"block; give vectors of {', '.join(_BLOCKS_BEFORE)}, or leave out jacobian"
        )
    try:
        jacobian.validate_model(model)
    except TypeError as error:
        raise ValueError(f"jacobian does not suit {model_name(model)}: {error}") from error
    last = int(model.cfg.n_layers) - 1
    outputs = [layer + _BLOCKS_BEFORE[hook] for layer in layers]
    missing = sorted({*outputs} - {*jacobian.source_layers, last})
    if missing:
        raise ValueError(
            f"the Jacobian lens has no matrix for the outputs of the blocks {missing}, and has "
            f"those of {list(jacobian.source_layers)}; name other layers, or fit it to these"
        )


def _transported(
    jacobian: Any, vectors: TaskVectors, hook: str, model: Any
) -> Float[Tensor, "task layer d_model"]:
    """Return what the Jacobian lens makes of vectors; the last block's output is what it is."""
    moved = vectors.values.clone()
    for place, layer in enumerate(vectors.layers):
        output = layer + _BLOCKS_BEFORE[hook]
        if output < int(model.cfg.n_layers) - 1:
            moved[:, place] = jacobian.transport(vectors.values[:, place], output)
    return moved


def _extremes(
    logits_of: Read, values: Float[Tensor, "task layer d"], k: int, *, with_probabilities: bool
) -> list[Num[Tensor, "task layer sign rank"]]:
    """Return the ids, logits, z and probabilities of the highest and the lowest tokens."""
    found = []
    for rows in rearrange(values, "task layer d -> (task layer) d").split(_ROWS):
        read = logits_of(rows)
        ends = [read.topk(k, dim=1, largest=largest) for largest in (True, False)]
        logits = torch.stack([one.values for one in ends], dim=1)
        mean, spread, total = (
            rearrange(of, "row -> row 1 1")
            for of in (read.mean(dim=1), read.std(dim=1), read.logsumexp(dim=1))
        )
        probabilities = (logits - total).exp()
        if not with_probabilities:
            probabilities = torch.full_like(logits, torch.nan)
        ids = torch.stack([one.indices for one in ends], dim=1)
        found.append((ids, logits, (logits - mean) / spread, probabilities))
    return [
        rearrange(torch.cat(some), "(task layer) ... -> task layer ...", task=len(values))
        for some in zip(*found, strict=True)
    ]
