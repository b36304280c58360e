"""Small dictionaries, trained here: the largest features of each activation (Gao et al. 2024).

An activation is written as a sum of ``k`` of many directions::

    f = top_k(relu(W_enc^T (x - b_dec) + b_enc))        decode(f) = W_dec^T f + b_dec
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from einops import einsum, reduce
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from transformer_lens_taskvec._utils.atomic_io import reading, replacing
from transformer_lens_taskvec.activations import Activations, check_finite
from transformer_lens_taskvec.models.protocol import fingerprint, hook_name, model_name
from transformer_lens_taskvec.vectors.all_tokens import Origin, Residuals
from transformer_lens_taskvec.vectors.encoding import check_origin

_FORMAT = "taskvec-dictionary-1"
_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True, repr=False)
class TopKDictionary:
    """A dictionary that keeps the ``k`` largest features of each activation.

    Attributes:
        W_enc: ``[d, d_sae]``.
        b_enc: ``[d_sae]``.
        W_dec: ``[d_sae, d]``, rows of length one.
        b_dec: ``[d]``.
        k: The most features that are active at once.
        origin: The model, hook point and layer it belongs to.

    Example:
        >>> import tempfile, torch
        >>> own = TopKDictionary(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), k=1)
        >>> own.encode(torch.tensor([0.5, 2.0, -3.0]))
        tensor([0., 2., 0.])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     own.save(f"{folder}/own.safetensors")
        ...     TopKDictionary.load(f"{folder}/own.safetensors")
        TopKDictionary(3 features of width 3, 1 at once)
    """

    W_enc: Float[Tensor, "d d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d"]
    b_dec: Float[Tensor, " d"]
    k: int
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        """Check the shapes."""
        n, d = self.W_dec.shape
        shapes = [tuple(getattr(self, name).shape) for name in _WEIGHTS]
        if shapes != [(d, n), (n,), (n, d), (d,)]:
            raise ValueError(
                f"{', '.join(_WEIGHTS)} have the shapes {shapes}; they must be [d, d_sae], "
                "[d_sae], [d_sae, d] and [d]"
            )
        if not 1 <= self.k <= n:
            raise ValueError(f"k is {self.k}; it must be from 1 to the number of features, {n}")

    @property
    def hook_name(self) -> str | None:
        """The full name of the hook point it belongs to, or None where it is not known."""
        hook, layer = self.origin.hook, self.origin.layer
        return None if hook is None or layer is None else hook_name(hook, layer)

    def encode(self, x: Float[Tensor, "*rows d"], /) -> Float[Tensor, "*rows d_sae"]:
        """Return the activations of the features: at most ``k`` above zero."""
        centred = x.to(self.W_enc) - self.b_dec
        before = einsum(centred, self.W_enc, "... d, d feature -> ... feature") + self.b_enc
        return _largest(before, self.k)

    def decode(self, features: Float[Tensor, "*rows d_sae"], /) -> Float[Tensor, "*rows d"]:
        """Return the sum of the directions, each times its feature, and ``b_dec``."""
        own = features.to(self.W_dec)
        return einsum(own, self.W_dec, "... feature, feature d -> ... d") + self.b_dec

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the dictionary to a safetensors file; no partial file is left."""
        metadata = {
            "format": _FORMAT,
            "k": json.dumps(self.k),
            "origin": json.dumps(asdict(self.origin)),
            "version": version("transformer-lens-taskvec"),
        }
        weights = {name: getattr(self, name).contiguous() for name in _WEIGHTS}
        with replacing(Path(path)) as temporary:
            save_file(weights, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any = None) -> TopKDictionary:
        """Return the dictionary that :meth:`save` wrote; nothing is unpickled.

        Args:
            path: The file.
            model: If given, the model that the dictionary must belong to.

        Raises:
            ValueError: If the file is damaged or holds no dictionary, or it belongs to another
                model.
            OSError: If the file cannot be read.

        Warns:
            UserWarning: If the model has other weights than the one it was trained on.
        """
        with reading(path, "damaged, or not a dictionary"):
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in _WEIGHTS}
            if metadata.get("format") != _FORMAT:
                raise TypeError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
            origin = Origin(**json.loads(metadata["origin"]))
            found = cls(**weights, k=int(json.loads(metadata["k"])), origin=origin)
        if model is not None:
            check_origin(origin, model_name(model), fingerprint(model))
        return found

    def __repr__(self) -> str:
        n, d = self.W_dec.shape
        place = f", {self.hook_name} of {self.origin.model}" if self.hook_name else ""
        return f"TopKDictionary({n} features of width {d}, {self.k} at once{place})"


def train_dictionary(
    activations: Residuals | Activations | Float[Tensor, "token d"],
    *,
    n_features: int | None = None,
    k: int = 32,
    steps: int = 2000,
    batch_size: int = 1024,
    rate: float = 1e-3,
    outliers: float = 10.0,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> TopKDictionary:
    """Return a dictionary trained to reconstruct activations from ``k`` features each.

    The loss is the squared error over the activations' variance. ``b_dec`` begins at their mean,
    the directions at random and keep length one, ``W_enc`` at their transpose. Four times in the
    first half of training, features that were active in no batch since the last time are *revived*:
    each gets as its direction the error of an example of the batch, drawn with a probability
    proportional to its squared error, and weak weights to detect it (after Bricken et al. 2023).

    Args:
        activations: Activations of one layer; many times more than features, such as those of
            :func:`residuals`.
        n_features: The number of features, 8 per dimension by default.
        k: The features that are kept of each activation.
        steps: The number of Adam's steps; its rate falls linearly in the last fifth.
        batch_size: Activations per step, drawn without replacement in each round.
        rate: Adam's, for activations scaled to a root mean square of one.
        outliers: Activations longer than this many times the median length are left out. A few
            tokens, not only the first of a text, can be a hundred times as long as the others, and
            would be nearly all of the loss; infinity leaves out none.
        seed: Seed of the directions and the batches.
        report: Called in every step with its number and the loss before it.

    Raises:
        ValueError: If there are several layers or an axis of heads, an activation is not finite,
            all are equal, or a number is out of range.

    Example:
        >>> import transformer_lens_taskvec as tv
        >>> from transformer_lens_taskvec.vectors.all_tokens import residuals
        >>> model = tv.load_model("toy")
        >>> episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 20, 4, seed=0)
        >>> losses = []
        >>> dictionary = train_dictionary(
        ...     residuals(model, episodes, 1, 2000),
        ...     n_features=128,
        ...     k=8,
        ...     steps=200,
        ...     batch_size=256,
        ...     report=lambda step, loss: losses.append(loss),
        ... )
        >>> dictionary
        TopKDictionary(128 features of width 64, 8 at once, blocks.1.hook_resid_post of toy@1500)
        >>> losses[-1] < 0.1 < losses[0]
        True
    """
    values, origin = _training_set(activations)
    n = 8 * values.shape[1] if n_features is None else n_features
    if not 1 <= k <= n or steps < 1 or batch_size < 1 or not rate > 0 or not outliers >= 1:
        raise ValueError(
            f"n_features is {n}, k {k}, steps {steps}, batch_size {batch_size}, rate {rate} and "
            f"outliers {outliers}; they must be above 0, k at most n_features, and outliers at "
            "least 1"
        )
    usual = _usual(values, outliers)
    mean, size = _moments(values, usual)
    generator = torch.Generator().manual_seed(seed)
    rows_of = torch.nn.functional.normalize
    W_dec = rows_of(torch.randn(n, values.shape[1], generator=generator), dim=1).to(values.device)
    weights = {
        "W_enc": W_dec.T.contiguous(),
        "b_enc": torch.zeros(n, device=values.device),
        "W_dec": W_dec,
        "b_dec": torch.zeros_like(mean),  # in training, activations are centred
    }
    for weight in weights.values():
        weight.requires_grad_()
    optimizer = torch.optim.Adam(weights.values(), lr=rate)
    fired = torch.zeros(n, dtype=torch.bool, device=values.device)
    every = max(1, steps // 8)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if not len(order):
            order = usual[torch.randperm(len(usual), generator=generator)]
        rows, order = order[:batch_size], order[batch_size:]
        batch = (values[rows.to(values.device)].float() - mean) / size
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 5 * (1 - step / steps))
        with torch.enable_grad():
            # As encode and decode do, without the product that gradients of batch - b_dec take.
            shift = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
            features = _largest(batch @ weights["W_enc"] + shift, k)
            error = batch - weights["b_dec"] - features @ W_dec
            loss = error.square().mean()
            gradients = torch.autograd.grad(loss, list(weights.values()))
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        with torch.no_grad():
            W_dec.copy_(rows_of(W_dec, dim=1))
            fired |= (features > 0).any(dim=0)
            if (step + 1) % every == 0 and step + 1 <= steps // 2:
                _revive(weights, optimizer, ~fired, error.detach(), generator)
                fired.zero_()
        if report is not None:
            report(step, float(loss.detach()))
    found = {name: weight.detach().cpu() for name, weight in weights.items()}
    scaled = {"b_enc": found["b_enc"] * size, "b_dec": found["b_dec"] * size + mean.cpu()}
    return TopKDictionary(**{**found, **scaled}, k=k, origin=origin)


def _largest(before: Float[Tensor, "*rows d_sae"], k: int) -> Float[Tensor, "*rows d_sae"]:
    values, places = before.relu().topk(k, dim=-1, sorted=False)
    return torch.zeros_like(before).scatter(-1, places, values)


def _training_set(
    activations: Residuals | Activations | Tensor,
) -> tuple[Float[Tensor, "token d"], Origin]:
    origin = Origin()
    values = activations if isinstance(activations, Tensor) else activations.values
    if isinstance(activations, Activations):
        check_finite(activations)
        if len(activations.layers) != 1 or values.ndim != 3:
            raise ValueError(
                f"activations have the shape {tuple(values.shape)} [example, layer, ...]; collect "
                "one layer of a hook without heads, as in collect(..., layers=[1])"
            )
        source, layer = activations.source, activations.layers[0]
        origin = Origin(source.model, source.hook, layer, source.weights, source.revision)
        values = values[:, 0]
    elif isinstance(activations, Residuals):
        origin = activations.origin
    if values.ndim != 2 or not len(values):
        raise ValueError(f"activations have the shape {tuple(values.shape)}; give [token, d]")
    return values, origin


def _usual(values: Float[Tensor, "token d"], outliers: float) -> Int[Tensor, " row"]:
    """Return the rows that are not longer than some times the median length."""
    lengths = torch.cat([rows.float().norm(dim=1).cpu() for rows in values.split(4096)])
    limit = outliers * float(lengths.median())
    return (lengths <= (limit or torch.inf)).nonzero()[:, 0]


def _moments(
    values: Float[Tensor, "token d"], usual: Int[Tensor, " row"]
) -> tuple[Float[Tensor, " d"], float]:
    """Return the mean of some rows, and the root mean square of their entries around it."""
    total = torch.zeros(values.shape[1], dtype=torch.float64)
    for rows in usual.split(4096):
        total += reduce(values[rows.to(values.device)].cpu().double(), "row d -> d", "sum")
    mean, power = total / max(1, len(usual)), 0.0
    for rows in usual.split(4096):
        power += float((values[rows.to(values.device)].cpu().double() - mean).square().sum())
    size = (power / max(1, len(usual) * values.shape[1])) ** 0.5
    if not 1e-9 * float(mean.abs().max()) < size < torch.inf:
        raise ValueError(
            f"the standard deviation of the activations is {size}, so there is nothing to "
            "reconstruct; give finite activations of different tokens"
        )
    return mean.to(values.device, torch.float32), size


def _revive(
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Adam,
    dead: Tensor,
    error: Float[Tensor, "row d"],
    generator: torch.Generator,
) -> None:
    """Give dead features new directions, and forget what Adam knew of them."""
    places = dead.nonzero()[:, 0]
    squares = reduce(error.square(), "row d -> row", "sum").cpu()
    if not len(places) or not bool(squares.sum() > 0):
        return
    rows = torch.multinomial(squares, len(places), replacement=True, generator=generator)
    fresh = torch.nn.functional.normalize(error[rows.to(error.device)], dim=1)
    usual = weights["W_enc"].norm(dim=0).mean()
    weights["W_dec"][places] = fresh
    weights["W_enc"][:, places] = 0.2 * usual * fresh.T  # weak, so as not to upset the others
    weights["b_enc"][places] = 0.0
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[weights["W_dec"]][name][places] = 0.0
        optimizer.state[weights["W_enc"]][name][:, places] = 0.0
        optimizer.state[weights["b_enc"]][name][places] = 0.0
