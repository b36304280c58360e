"""What counted passes cost: a few of them are run, with fewer rows, and timed and watched."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from functools import partial
from math import prod
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transformer_lens_taskvec.models import counted
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.carried import hooks_of_callers, without_hooks
from transformer_lens_taskvec.models.counted import Count, Pass
from transformer_lens_taskvec.models.forward import (
    mask_dtype,
    run_branches,
    run_prefix,
    run_prompts,
    run_until,
)
from transformer_lens_taskvec.models.past import Past, Segment
from transformer_lens_taskvec.models.protocol import device_of, hook_name, inference
from transformer_lens_taskvec.models.tokens import PromptBatch

_FEW_TOKENS = 64
"""The tokens of the first passes that are timed; the next ones have four times as many each."""

_PATIENCE = 4.0
"""About the most seconds that timing passes may take."""

_WATCHED = 256
"""The tokens of a pass whose memory is watched."""


def seconds(model: Any, count: Count) -> float:
    """Return how long the passes of a count take, by passes like them.

    Time is linear in blocks, tokens, pairs of tokens that attention compares, keys and values that
    are put together, and logits. The factors are fitted to passes of each kind with few rows.
    """
    with inference(model), without_hooks(model, hooks_of_callers(model)):
        features, measured, started = list[list[float]](), list[float](), counted.clock()
        tokens, expected = 1.0, 0.0
        for one, rows in _samples(count.passes):
            if measured:
                expected = measured[-1] * rows * _row_tokens(one) / tokens
            if counted.clock() - started + expected > _PATIENCE:
                break
            run, tokens = _run(model, one, rows), rows * _row_tokens(one)
            if not measured:
                _timed(run, model)
            features.append(_features(one, rows))
            often = 1 if expected > 0.1 else 3
            measured.append(median(_timed(run, model) for _ in range(often)))
        factors = _fitted(np.array(features), np.array(measured)) if measured else np.zeros(5)
        passes = sum(
            n * float(np.dot(_features(one, one.rows), factors))
            for one, n in Counter(count.passes).items()
        )
        return passes + _reading(model, [prod(shape) for shape in count.reads])


def peak_bytes(model: Any, count: Count) -> int:
    """Return the most bytes of tensors that are there at once in what was counted."""
    size, vocab = torch.finfo(mask_dtype(model)).bits // 8, int(getattr(model.cfg, "d_vocab", 0))
    with inference(model), without_hooks(model, hooks_of_callers(model)):
        stored = _kv_bytes(model) if any(one.stored for one in count.passes) else 0
        bytes_of = _bytes_by_proxy(model, set(count.passes))
    most = before = held = 0.0
    for event in count.events:
        # The logits that were read last are dropped only when the next ones are there.
        if isinstance(event, Pass):
            held = float(stored * event.stored)
            most = max(most, before + held + _proxy(model, event) * bytes_of[event.kind])
            logits = event.rows * event.width if event.kind == "whole" else 0
            before = float(logits * size * vocab)
            held += event.rows * event.width * int(model.cfg.d_model) * size  # what is read
        else:
            tile = prod(event) * size * vocab
            probabilities = prod(event[1:]) * vocab * (4 if size == 4 else 8)  # of one row
            most = max(most, held + tile + max(before, probabilities))
            before = float(tile)
    return int(most) + count.kept + count.copied


def _bytes_by_proxy(model: Any, passes: Set[Pass]) -> dict[str, float]:
    """Return what to multiply :func:`_proxy` by, by kind: of the largest pass, with few rows."""
    factors = {}
    for kind in {one.kind for one in passes}:
        one = max((one for one in passes if one.kind == kind), key=partial(_proxy, model))
        rows = min(one.rows, max(1, _WATCHED // max(1, one.width)))
        factors[kind] = most_alive(_run(model, one, rows)) / _proxy(model, replace(one, rows=rows))
    return factors


def _samples(passes: Sequence[Pass]) -> list[tuple[Pass, int]]:
    """Return passes of each kind, and with how many rows to run them, those of few tokens first."""
    chosen: dict[tuple[Any, ...], tuple[Pass, int]] = {}
    kinds: dict[tuple[Any, ...], list[Pass]] = {}
    for one in passes:
        kinds.setdefault((one.kind, one.end, one.before > 0), []).append(one)
    for kind, some in kinds.items():
        of_kind = sorted(some, key=_row_tokens)
        for place in (0.5, 0.0, 1.0):
            one = of_kind[round(place * (len(of_kind) - 1))]
            tokens = float(_FEW_TOKENS)
            while True:
                rows = min(one.rows, max(1, round(tokens / max(1.0, _row_tokens(one)))))
                chosen[kind, one.width, one.before, one.branches, rows] = one, rows
                if rows == one.rows:
                    break
                tokens *= 4
    return sorted(chosen.values(), key=lambda pair: pair[1] * _row_tokens(pair[0]))


def _row_tokens(one: Pass) -> float:
    """Return the tokens of a row, each counted by the share of blocks that it enters."""
    return sum(one.layers) / max(1, len(one.layers))


def _features(one: Pass, rows: int) -> list[float]:
    depth = sum(one.layers)
    keys = one.before + one.width
    copied = rows * keys * len(one.layers) if one.before else 0
    logits = rows * one.width if one.kind == "whole" else 0
    return [float(len(one.layers)), rows * depth, rows * depth * keys, copied, logits]


def _fitted(features: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Return factors that are not negative; long passes count for more, in which more time goes."""
    scale, weight = np.maximum(features.max(axis=0), 1e-9), measured**-0.5
    return np.asarray(nnls(features / scale * weight[:, None], measured * weight)[0] / scale)


def _reading(model: Any, tokens: Sequence[int]) -> float:
    """Return how long logits take that are made apart from passes."""
    readout = capabilities(model).readout
    if not tokens or readout is None:
        return 0.0
    times = []
    for n in (some := sorted({max(tokens), max(1, max(tokens) // 4)})):
        hidden = torch.randn(n, int(model.cfg.d_model)).to(device_of(model), mask_dtype(model))
        run = partial(readout.logits, model, hidden)
        times.append(median(_timed(run, model) for _ in range(3)))
    slope = (times[-1] - times[0]) / max(1, some[-1] - some[0]) if len(some) > 1 else 0.0
    return float(sum(max(0.0, times[-1] - slope * (some[-1] - n)) for n in tokens))


def _run(model: Any, one: Pass, rows: int) -> Callable[[], Any]:
    """Return a call like a pass, of some rows."""
    device, width = device_of(model), one.width
    if one.kind == "numbers":
        vectors = torch.randn(rows, width, int(model.cfg.d_input), device=device)
        if one.end is None:
            return partial(model.run_with_hooks, vectors, fwd_hooks=[])
        return partial(run_until, model, vectors, None, (), one.end)
    tokens = torch.randint(int(model.cfg.d_vocab), (rows, width), device=device)
    if one.kind == "whole":
        return partial(run_prompts, model, tokens)
    past = _past(model, rows, one.before) if one.before else None
    if one.kind == "branches":
        can, length = capabilities(model), width // one.branches
        active = [n // length for n in one.layers] if can.shares_layers else None
        return partial(
            run_branches,
            model,
            tokens,
            past or Past(),
            n_branches=one.branches,
            active=active,
            reads_out=one.end is None,
        )
    end = one.end or hook_name("resid_post", len(one.layers) - 1)
    return partial(run_until, model, tokens, None, (), end, past=past)


def _past(model: Any, rows: int, width: int) -> Past:
    """Return keys and values of some rows as a prefix leaves them."""

    def alike(one: Tensor) -> Tensor:
        return one.expand(rows, -1, width, -1).contiguous()

    layers = {
        layer: (alike(keys), alike(values))
        for layer, (keys, values) in _prefix(model).layers.items()
    }
    device = device_of(model)
    segment = Segment(layers, torch.ones(rows, width, dtype=torch.bool, device=device))
    return Past(((segment, torch.arange(rows, device=device)),))


def _prefix(model: Any) -> Segment:
    """Return the keys and values of one token."""
    one = torch.ones(1, 1, dtype=torch.long, device=device_of(model))
    return run_prefix(model, PromptBatch(one, one.bool(), (0,), (1,))).parts[0][0]


def _kv_bytes(model: Any) -> int:
    """Return the bytes of a token's keys and values."""
    pairs = _prefix(model).layers.values()
    return sum(one.numel() * one.element_size() for pair in pairs for one in pair)


def _proxy(model: Any, one: Pass) -> float:
    """Return about how many numbers a pass needs at once."""
    cfg = model.cfg
    wide = 3 * int(getattr(cfg, "d_mlp", None) or 4 * int(cfg.d_model))
    keys = 3 * int(getattr(cfg, "n_heads", None) or 1) * (one.before + one.width)
    logits = int(cfg.d_vocab) if one.kind == "whole" else 0
    return float(one.rows * max(one.layers, default=0) * (wide + keys + logits))


def _timed(run: Callable[[], Any], model: Any) -> float:
    started = counted.clock()
    run()
    if device_of(model).type == "cuda":
        torch.cuda.synchronize(device_of(model))
    return counted.clock() - started


def most_alive(run: Callable[[], Any]) -> int:
    """Return the most bytes of new tensors that are alive at once during a call."""
    with _Alive() as alive:
        run()
    most: int = alive.most
    return most


class _Alive(TorchDispatchMode):
    """Adds up the storages of tensors from when they are made until nothing holds them."""

    def __init__(self) -> None:
        """Begin with nothing."""
        begin: Callable[[], None] = super().__init__
        begin()
        self._sizes: dict[int, int] = {}
        self._now = self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key in given or key in self._sizes:
                continue
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._gone, key)
        return result

    def _gone(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)
