"""From remembering channels to inferring any, as their number grows (Zecchin et al. 2023).

A model is trained on each number of channels. With few it follows the estimator that knows the
finite set, and fails on fresh channels; with many, the one that knows how channels are distributed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from transformer_lens_taskvec._utils.atomic_io import write_text
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.lab.emergence import swap_matrix
from transformer_lens_taskvec.lab.episodes import problem_episodes
from transformer_lens_taskvec.lab.presets import train
from transformer_lens_taskvec.lab.problems.mimo.finding import (
    CHANNELS,
    Equaliser,
    fresh_tasks,
    measure_equaliser,
)
from transformer_lens_taskvec.lab.problems.mimo.problem import MimoEqualisation
from transformer_lens_taskvec.lab.training.on_problem import TrainConfig
from transformer_lens_taskvec.plots import styled
from transformer_lens_taskvec.plots.style import COLOURS, GREY, legend_beside

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_TRAIN, _CHOOSE, _TEST = 11, 12, 13


@dataclass(frozen=True, repr=False)
class ThresholdSweep(Shown):
    """Models trained on different numbers of channels, measured on them and on fresh ones.

    Attributes:
        n_channels: The number of channels in each training.
        equalisers: Their errors, distances from the estimators, and TD.
        swaps: The query's error when the channel's representation is replaced by the mean of the
            channel's own sequences and of others', divided by the error without,
            ``[training, channels, own or other]``: of the problem's tasks, and of as many fresh
            channels; NaN where there is no other channel. The means replace the subspace in which
            they differ at all tokens before the query; see :func:`swap_matrix`.
        swap_layers: The layer of each swap, ``[training, channels]``.

    Example:
        >>> import tempfile
        >>> from transformer_lens_taskvec.lab.threshold import threshold_sweep
        >>> small = {"steps": 2, "d_model": 8, "n_layers": 1, "batch_size": 4, "n_eval": 4}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = threshold_sweep((1, 2), folder, n=12, progress=False, **small)
        >>> found.to_frame().shape, found.swaps.shape
        ((4, 13), torch.Size([2, 2, 2]))
    """

    n_channels: tuple[int, ...]
    equalisers: tuple[Equaliser, ...]
    swaps: Float[Tensor, "training channels means"]
    swap_layers: tuple[tuple[int, int], ...]

    @property
    def crossing(self) -> int | None:
        """The fewest channels with which a model is nearer to the true prior on fresh channels.

        None if all are nearer to the finite prior.
        """
        for n, found in zip(self.n_channels, self.equalisers, strict=True):
            if found.distance["true prior"][1] < found.distance["finite prior"][1]:
                return n
        return None

    def to_frame(self) -> pd.DataFrame:
        """One row per training and kind of channels.

        Columns ``n_channels, channels``, the late errors ``error, finite_prior, true_prior,
        known_channel``, the model's distances ``to_finite_prior, to_true_prior``, TD at the query
        and at the symbols sent last, ``td`` and ``td_of_output``, at :attr:`Equaliser.best_layer`,
        that of the query's numbers alone, ``td_of_input``, and ``own_swap, other_swap``.
        """
        import pandas as pd

        rows = []
        for n, found, swap in zip(self.n_channels, self.equalisers, self.swaps, strict=True):
            for place, kind in enumerate(CHANNELS):
                own, other = swap[place].tolist()
                rows.append(
                    {
                        "n_channels": n,
                        "channels": kind,
                        "error": found.late("model")[place],
                        **{
                            name.replace(" ", "_"): found.late(name)[place]
                            for name in ("finite prior", "true prior", "known channel")
                        },
                        "to_finite_prior": float(found.distance["finite prior"][place]),
                        "to_true_prior": float(found.distance["true prior"][place]),
                        "td": float(found.td[place, found.best_layer]),
                        "td_of_output": float(found.td_of_output[place, found.best_layer]),
                        "td_of_input": float(found.td_of_input[place]),
                        "own_swap": own,
                        "other_swap": other,
                    }
                )
        return pd.DataFrame(rows)

    def save(self, folder: str | Path) -> Path:
        """Write ``threshold.json`` to a folder and return its path."""
        path = Path(folder) / "threshold.json"
        rows = json.loads(self.to_frame().to_json(orient="records"))
        write_text(path, json.dumps({"crossing": self.crossing, "rows": rows}, indent=1) + "\n")
        return path

    def __repr__(self) -> str:
        where = "none" if self.crossing is None else f"from {self.crossing} channels on"
        fresh = [f"{found.late('model')[1]:.3f}" for found in self.equalisers]
        return (
            f"ThresholdSweep(trained on {', '.join(map(str, self.n_channels))} channels: error on "
            f"fresh channels {', '.join(fresh)}; nearer to the true prior there: {where})"
        )


def threshold_sweep(
    n_channels: Sequence[int],
    out_dir: str | Path,
    *,
    problem: MimoEqualisation | None = None,
    n: int = 100,
    n_sequences: int = 500,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> ThresholdSweep:
    """Train a model for each number of channels, or resume its training, and measure all of them.

    Args:
        n_channels: Numbers of channels.
        out_dir: Each run is in its own folder there, ``M4`` for 4 channels.
        problem: The problem, whose number of channels is replaced; by default with the paper's
            settings.
        n: Sequences per channel for TD, for the swaps' means and for their effects.
        n_sequences: Sequences for errors and distances.
        seed: Seed of the trainings and of all sequences.
        progress: Whether to show progress bars.
        **settings: Of :class:`TrainConfig`, in place of the problem's defaults, for example
            ``steps``.

    Raises:
        ValueError: If a number of channels is wrong or given twice, or a folder holds another run.

    Example:
        >>> import tempfile
        >>> from transformer_lens_taskvec import lab
        >>> small = {"steps": 2, "d_model": 8, "n_layers": 1, "batch_size": 4, "n_eval": 4}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = lab.threshold_sweep((1, 2), folder, n=12, progress=False, **small)
        >>> found.n_channels
        (1, 2)
    """
    problem = MimoEqualisation() if problem is None else problem
    numbers = tuple(sorted(set(n_channels)))
    if len(numbers) < len(n_channels) or not numbers:
        raise ValueError(f"n_channels is {list(n_channels)}; give one or more numbers, each once")
    problems = [replace(problem, n_channels=number) for number in numbers]
    configs = [TrainConfig(problem=own, **{**problem.defaults, **settings}) for own in problems]
    equalisers, swaps, layers = [], [], []
    pairs = list(zip(problems, configs, strict=True))
    for own, config in tqdm(pairs, disable=not progress, leave=False, desc="trainings"):
        folder = Path(out_dir) / f"M{own.n_channels}"
        run = train(config, folder, seed=seed, progress=progress)
        model = run.model()
        measured = measure_equaliser(model, own, n_sequences=n_sequences, n_per_task=n, seed=seed)
        equalisers.append(measured)
        both = [swapped(model, one, n=n, seed=seed) for one in (own, fresh_tasks(own))]
        swaps.append([ratios for ratios, _ in both])
        layers.append((both[0][1], both[1][1]))
    return ThresholdSweep(numbers, tuple(equalisers), torch.tensor(swaps), tuple(layers))


def swapped(
    model: Any, problem: MimoEqualisation, *, n: int = 100, seed: int = 0
) -> tuple[tuple[float, float], int]:
    """Return what swapping the tasks' representations does to the query's error.

    The layer is the one at which, on separate sequences, another task's mean harms most compared
    with the task's own.

    Args:
        model: A model of the lab.
        problem: What its sequences are drawn from.
        n: Sequences per task, for the means, for the choice of the layer and for the effect.
        seed: Seed of the sequences.

    Returns:
        The error with the own and with another task's mean, divided by that without, the mean over
        tasks; and the layer. With one task there is no other, and both are NaN.

    Example:
        >>> from transformer_lens_taskvec.lab import TrainConfig
        >>> from transformer_lens_taskvec.lab.problems.mimo import MimoEqualisation
        >>> from transformer_lens_taskvec.lab.threshold import swapped
        >>> problem = MimoEqualisation(n_channels=2, n_points=4)
        >>> model = TrainConfig(problem=problem, n_layers=1, d_model=8).model()
        >>> ratios, layer = swapped(model, problem, n=5)
        >>> [round(ratio) for ratio in ratios], layer
        ([1, 1], 0)
    """
    if len(problem.tasks) < 2:
        return (float("nan"), float("nan")), 0
    means, choose, test = (
        problem_episodes(problem, n, seed=1_000 * seed + kind) for kind in (_TRAIN, _CHOOSE, _TEST)
    )
    layer = max(
        range(model.cfg.n_layers),
        key=lambda one: swap_matrix(model, means, choose, one).conditional_decoding,
    )
    found = swap_matrix(model, means, test, layer)
    before = torch.tensor([[found.baseline.of(task).mean_loss] for task in found.sources])
    ratio = 1 + found.delta_loss.double() / before
    own = torch.eye(len(ratio), dtype=torch.bool)
    return (float(ratio[own].mean()), float(ratio[~own].mean())), layer


@styled
def plot_threshold(sweep: ThresholdSweep) -> Figure:
    """Draw a sweep: errors, distances from the two Bayes estimators, TD, and the swaps' effects.

    With fewer than 8 channels TD is among fewer tasks, and so higher by chance.

    Args:
        sweep: From :func:`threshold_sweep`.

    Example:
        >>> import tempfile
        >>> from transformer_lens_taskvec import lab
        >>> small = {"steps": 2, "d_model": 8, "n_layers": 1, "batch_size": 4, "n_eval": 4}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = lab.threshold_sweep((1, 2), folder, n=12, progress=False, **small)
        >>> len(lab.plot_threshold(found).axes)
        4
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure, axes = plt.subplots(2, 2, figsize=(11.5, 5.6), layout="constrained", sharex=True)
    frame = sweep.to_frame()
    for place, kind in enumerate(CHANNELS):
        rows = frame[frame["channels"] == kind]
        of_kind: dict[str, Any] = {"color": COLOURS[place], "marker": "os"[place]}

        def draw(ax: Any, column: str, label: str, rows: Any = rows, **style: Any) -> None:
            ax.plot(rows["n_channels"], rows[column], label=label, **style)

        draw(axes[0, 0], "error", f"model, {kind}", **of_kind)
        draw(axes[0, 0], "finite_prior", f"finite prior, {kind}", color=COLOURS[place], ls="--")
        if place == 1:
            draw(axes[0, 0], "true_prior", "true prior, fresh channels", color=GREY, ls="-.")
            draw(axes[0, 1], "to_finite_prior", "from the finite prior", **of_kind)
            draw(axes[0, 1], "to_true_prior", "from the true prior", color=GREY, marker="^")
        draw(axes[1, 0], "td_of_output", f"symbols sent last, {kind}", **of_kind)
        draw(axes[1, 0], "td", f"query, {kind}", color=COLOURS[place], ls="--")
        draw(axes[1, 0], "td_of_input", f"numbers alone, {kind}", color=COLOURS[place], ls=":")
        draw(axes[1, 1], "other_swap", f"another's mean, {kind}", **of_kind)
        draw(axes[1, 1], "own_swap", f"own mean, {kind}", **{**of_kind, "ls": ":"})
    labels: Mapping[tuple[int, int], tuple[str, str]] = {
        (0, 0): ("error", "squared error per real number"),
        (0, 1): ("distance on fresh channels", "squared difference"),
        (1, 0): ("decodability of the channel", "task decodability"),
        (1, 1): ("effect of a swap", "error, multiple of that without"),
    }
    for at, (title, label) in labels.items():
        axes[at].set(xscale="log", title=title, ylabel=label)
        legend_beside(axes[at])
        axes[at].set_xticks(sweep.n_channels, [str(number) for number in sweep.n_channels])
        axes[at].xaxis.set_minor_locator(NullLocator())
    for ax in (axes[0, 0], axes[1, 1]):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    axes[1, 0].set_ylim(0, 1.03)
    for ax in axes[1]:
        ax.set_xlabel("channels in training")
    return figure
