"""What a training run is: its settings, its folder, and reading both back.

A run's folder holds ``config.json`` (settings and seed), ``metrics.jsonl`` (one evaluation a line),
``checkpoints/step_000000.safetensors`` (the model at each evaluation) and, to resume from,
``state.safetensors`` (model, optimisers and generator at the last save). Every file is written
beside its place and then moved there, so that none is ever half written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from transformer_lens_taskvec._utils.atomic_io import read_json, reading, write_text, write_whole
from transformer_lens_taskvec._utils.results import Shown
from transformer_lens_taskvec.lab.model import RegressionConfig, RegressionTransformer
from transformer_lens_taskvec.lab.problems import families
from transformer_lens_taskvec.lab.problems.base import Family, Mixture, balanced_labels
from transformer_lens_taskvec.lab.problems.families import RegressionFamilies
from transformer_lens_taskvec.lab.problems.sparse_linear import SparseLinearMixture
from transformer_lens_taskvec.lab.training.recipe import Recipe

if TYPE_CHECKING:
    import pandas as pd

_EVAL_SEED = 2_000_003


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """The settings of a training run on a mixture; the defaults are the paper's (App. D).

    Besides those of :class:`Recipe`:

    Attributes:
        mixture: What the sequences are drawn from.
        n_layers: Blocks of the model.
        n_heads: Attention heads of a block.
        d_model: Width of the residual stream.
        init: ``"gpt2"`` for standard deviations of 0.02, ``"fan_in"`` for ones that keep the scale
            of activations; either way, smaller for projections back into the residual stream.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> config = lab.TrainConfig()
        >>> config.n_layers, config.mixture.tasks, config.steps
        (12, ('B1', 'B2', 'B3', 'B4'), 80000)
    """

    mixture: Mixture = field(default_factory=SparseLinearMixture)
    n_layers: int = 12
    n_heads: int = 8
    d_model: int = 256
    init: Literal["gpt2", "fan_in"] = "gpt2"

    loss_name: ClassVar[str] = "mse"

    def _choices(self) -> dict[str, tuple[str, ...]]:
        return {**super()._choices(), "init": ("gpt2", "fan_in")}

    def model(self, *, seed: int = 0, device: torch.device | str = "cpu") -> RegressionTransformer:
        """An untrained model of this size."""
        cfg = RegressionConfig(
            d_input=self.mixture.dim,
            n_points=self.mixture.n_points,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_model=self.d_model,
            init=self.init,
            device=str(device),
        )
        return RegressionTransformer(cfg, seed=seed)

    def matrices(self, model: Any) -> list[nn.Parameter]:
        """The blocks' weight matrices."""
        named = model.named_parameters()
        return [p for name, p in named if name.startswith("blocks") and ".w_" in name]

    def loss(
        self, forward: Callable[..., Any], generator: torch.Generator, autocast: bool
    ) -> Tensor:
        """The squared error of the predictions at every position of a new batch."""
        batch = self.mixture.sample(self.batch_size, generator)
        with torch.autocast(batch.xs.device.type, torch.bfloat16, enabled=autocast):
            predictions = forward(batch.xs, batch.ys)
        error: Tensor = (predictions.float() - batch.ys).square().mean()
        return error

    def evaluate(self, model: Any) -> dict[str, Any]:
        """The mean squared error for each task at each position."""
        return {"mse": evaluate_mixture(model, self.mixture, n_eval=self.n_eval).tolist()}

    def summary(self, record: dict[str, Any]) -> str:
        """The error of each task over the second half of the sequence."""
        half = self.mixture.n_points // 2
        means = [sum(curve[half:]) / len(curve[half:]) for curve in record["mse"]]
        pairs = zip(self.mixture.tasks, means, strict=True)
        return " ".join(f"{task} {mse:.3f}" for task, mse in pairs)

    def load(self, path: Path) -> Run:
        """The run in a folder."""
        return load_run(path, mixture=self.mixture)

    def described(self) -> dict[str, Any]:
        """The settings as JSON has them, the mixture by its kind."""
        plain = {"mixture": _mixture_to(self.mixture)}
        for setting in dataclasses.fields(self):
            if setting.name != "mixture":
                plain[setting.name] = getattr(self, setting.name)
        described: dict[str, Any] = json.loads(json.dumps(plain))
        return described


@dataclass(frozen=True, repr=False)
class Run(Shown):
    """A training run, finished or not, as it stands in its folder.

    Attributes:
        path: The folder.
        config: Its settings.
        seed: The seed of weights and data.
        steps: The steps at which there is an evaluation and a checkpoint.
        mse: Mean squared error at each of them, ``[checkpoint, task, point]``.
        train_mse: The mean error of the training steps since the checkpoint before; NaN at step 0.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> run.tasks, len(run.steps), run.finished
        (('B1', 'B2', 'B3', 'B4'), 12, True)
        >>> run.model().cfg.n_layers, run.late_mse[-1].shape
        (5, torch.Size([4]))
    """

    path: Path
    config: TrainConfig
    seed: int
    steps: tuple[int, ...]
    mse: Float[Tensor, "checkpoint task point"]
    train_mse: tuple[float, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the latent tasks."""
        return self.config.mixture.tasks

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken."""
        return bool(self.steps) and self.steps[-1] == self.config.steps

    @property
    def late_mse(self) -> Float[Tensor, "checkpoint task"]:
        """The mean error over the second half of the sequence."""
        return self.mse[..., self.mse.shape[-1] // 2 :].mean(-1)

    def model(
        self, step: int | None = None, *, device: torch.device | str = "cpu"
    ) -> RegressionTransformer:
        """The model at a checkpoint, the last one by default, in evaluation mode.

        Raises:
            ValueError: If there is no checkpoint of that step, or it is damaged.
        """
        if not self.steps:
            raise ValueError(f"{self.path} holds no checkpoint yet; train goes on with the run")
        step = self.steps[-1] if step is None else step
        if step not in self.steps:
            raise ValueError(f"no checkpoint at step {step}; there are {list(self.steps)}")
        file = checkpoint_path(self.path, step)
        with reading(file, "damaged checkpoint, or another run's"):
            weights = load_file(file, device=str(device))
            self._check_size(sum(value.numel() for value in weights.values()))
            model = self.config.model(device=device)
            model.load_state_dict(weights)
        model.cfg.model_name = f"{self.path.name}@{step}"
        return model.eval()

    def _check_size(self, n_parameters: int) -> None:
        """Raise before a model is made that damaged settings make too large for the memory."""
        config, mixture = self.config, self.config.mixture
        ends = (mixture.dim + 2 * mixture.n_points) * config.d_model
        if 12 * config.n_layers * config.d_model**2 + ends > n_parameters:
            raise ValueError(
                f"it holds {n_parameters} numbers, too few for the model that config.json describes"
            )

    def export(
        self, path: str | Path, steps: Sequence[int], *, dtype: torch.dtype = torch.float16
    ) -> Run:
        """Write some of the checkpoints as a run of their own, for keeping or sending.

        Args:
            path: An empty or new folder.
            steps: The checkpoints.
            dtype: Of the weights on disk; they are float32 again when loaded.

        Returns:
            The run in the new folder. It cannot be trained further.

        Raises:
            ValueError: If there is no checkpoint at one of the steps, or the folder holds a run.
        """
        export_checkpoints(self.path, Path(path), steps, dtype)
        return load_run(path, mixture=self.config.mixture)

    def to_frame(self) -> pd.DataFrame:
        """One row for each checkpoint, task and point."""
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [self.steps, self.tasks, range(self.mse.shape[-1])], names=["step", "task", "point"]
        )
        return pd.DataFrame({"mse": self.mse.flatten().numpy()}, index=index).reset_index()

    def __repr__(self) -> str:
        if not self.steps:
            return f"Run({str(self.path)!r}: no checkpoint yet)"
        late = ", ".join(
            f"{task} {float(mse):.4f}"
            for task, mse in zip(self.tasks, self.late_mse[-1], strict=True)
        )
        return (
            f"Run({str(self.path)!r}: step {self.steps[-1]} of {self.config.steps}, "
            f"{len(self.steps)} checkpoints, late MSE: {late})"
        )


def evaluate_mixture(
    model: RegressionTransformer, mixture: Mixture, *, n_eval: int = 250, seed: int = _EVAL_SEED
) -> Float[Tensor, "task point"]:
    """The model's mean squared error for each task at each position.

    Args:
        model: The model.
        mixture: What the sequences are drawn from.
        n_eval: Sequences a task.
        seed: Their seed; by default the one that training evaluates with.

    Returns:
        Errors, ``[task, point]``.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> lab.evaluate_mixture(run.model(), run.config.mixture, n_eval=20).shape
        torch.Size([4, 16])
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    n_tasks = len(mixture.tasks)
    labels = balanced_labels(n_tasks, n_eval, device)
    batch = mixture.sample(len(labels), generator, labels=labels)
    with torch.no_grad():
        errors: Tensor = (model(batch.xs, batch.ys) - batch.ys).square()
    return errors.view(n_tasks, n_eval, -1).mean(1)


def shipped_run() -> Run:
    """The run that comes with the package: ``small``, seed 0, a dozen checkpoints.

    ``taskvec train --preset small`` makes it anew; here its weights are float16.

    Returns:
        The run.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_run()
        >>> run.steps[0], run.steps[-1], run.seed
        (0, 26000, 0)
    """
    return load_run(Path(__file__).parents[1] / "shipped" / "small")


def load_run(path: str | Path, *, mixture: Mixture | None = None) -> Run:
    """Read a run from its folder.

    Args:
        path: The folder that ``train`` wrote.
        mixture: The mixture of the run, needed when it has functions of the user's own, which no
            file can hold.

    Raises:
        FileNotFoundError: If there is no run in the folder.
        ValueError: If the mixture is needed and not given, the run is one of the toy model, or a
            file is damaged.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = lab.shipped_run().export(f"{folder}/some", steps=[0, 26000])
        ...     lab.load_run(f"{folder}/some").steps
        (0, 26000)
    """
    path = Path(path)
    saved = read_settings(path)
    if "mixture" not in saved:
        raise ValueError(f"{path} holds a run of the toy model; read it with load_toy_run")
    with reading(path / "config.json", "not the settings of a run that can be read"):
        seed = int(saved["seed"])
        known = {name: saved[name] for name in saved.keys() & _settings()}
        known["mixture"] = mixture or _mixture_from(saved["mixture"])
        config = TrainConfig(**{**known, "betas": tuple(saved["betas"])})
    records = read_metrics(path)
    with reading(path / "metrics.jsonl", "not the evaluations of this run"):
        mse = torch.tensor([record["mse"] for record in records], dtype=torch.float32)
        expected = (len(config.mixture.tasks), config.mixture.n_points)
        if records and mse.shape[1:] != expected:
            raise ValueError(f"errors of shape {tuple(mse.shape[1:])}, not {expected}")
        return Run(
            path=path,
            config=config,
            seed=seed,
            steps=tuple(record["step"] for record in records),
            mse=mse,
            train_mse=tuple(
                float("nan") if record["train_mse"] is None else float(record["train_mse"])
                for record in records
            ),
        )


def _settings() -> set[str]:
    return {setting.name for setting in dataclasses.fields(TrainConfig)}


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of the run in a folder, as JSON has them.

    Raises:
        FileNotFoundError: If there is no run in the folder.
        ValueError: If they are damaged.
    """
    file = path / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{path} holds no run: there is no config.json in it")
    saved = read_json(file, "damaged settings of a run")
    if not isinstance(saved, dict):
        raise ValueError(f"{file}: damaged settings of a run: expected an object")
    return saved


def export_checkpoints(
    source: Path, target: Path, steps: Sequence[int], dtype: torch.dtype
) -> None:
    """Copy a run with some of its checkpoints only, in another dtype.

    Raises:
        ValueError: If there is no checkpoint at one of the steps, or the target holds a run.
    """
    if (target / "config.json").exists():
        raise ValueError(f"{target} already holds a run; choose another folder")
    records = {record["step"]: record for record in read_metrics(source)}
    missing = sorted(set(steps) - set(records))
    if missing:
        raise ValueError(f"no checkpoint at step {missing[0]}; there are {sorted(records)}")
    kept = sorted(set(steps))
    for step in kept:
        file = checkpoint_path(source, step)
        with reading(file, "damaged checkpoint"):
            weights = load_file(file)
        small = {name: value.to(dtype) for name, value in weights.items()}
        write_tensors(checkpoint_path(target, step), small, {"step": str(step)})
    write_text(target / "metrics.jsonl", "".join(json.dumps(records[s]) + "\n" for s in kept))
    write_text(target / "config.json", (source / "config.json").read_text())


def checkpoint_path(path: Path, step: int) -> Path:
    """Where the model at a step is kept."""
    return path / "checkpoints" / f"step_{step:06d}.safetensors"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, in order.

    Raises:
        ValueError: If a line is no evaluation; the message gives the file and the line.
    """
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    with reading(file, "damaged evaluations"):
        lines = file.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        with reading(f"{file}, line {number}", "not an evaluation"):
            record = json.loads(line)
            if type(record["step"]) is not int or record["step"] < 0:
                raise ValueError(f"its step is {record['step']!r}")
            records.append(record)
    return records


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a whole safetensors file or nothing."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda beside: save_file(tensors, beside, metadata))


def _mixture_to(mixture: Mixture) -> dict[str, Any]:
    if type(mixture) is SparseLinearMixture:
        return {"kind": "SparseLinearMixture", **dataclasses.asdict(mixture)}
    if type(mixture) is RegressionFamilies:
        return {
            "kind": "RegressionFamilies",
            "families": {name: _family_to(family) for name, family in mixture.families.items()},
            "dim": mixture.dim,
            "noise_variance": mixture.noise_variance,
            "n_points": mixture.n_points,
        }
    return {"kind": type(mixture).__qualname__, "tasks": list(mixture.tasks), "own": True}


def _mixture_from(description: dict[str, Any]) -> Mixture:
    fields = dict(description)
    kind = fields.pop("kind")
    if kind == "SparseLinearMixture":
        fields["bases"] = tuple(tuple(basis) for basis in fields["bases"])
        return SparseLinearMixture(**fields)
    if kind == "RegressionFamilies":
        families = {name: _family_from(name, family) for name, family in fields["families"].items()}
        return RegressionFamilies(**{**fields, "families": families})
    raise ValueError(f"this run's mixture is a {kind} of its author's; give it as mixture=")


_FUNCTIONS: Mapping[str, Family] = {
    "linear": families.linear,
    "quadratic": families.quadratic,
}
_CLASSES: Mapping[str, Any] = {
    "SparseLinear": families.SparseLinear,
    "LeakyReLU": families.LeakyReLU,
    "LinearOnRepresentation": families.LinearOnRepresentation,
}


def _family_to(family: Family) -> dict[str, Any]:
    for name, function in _FUNCTIONS.items():
        if family is function:
            return {"function": name}
    if type(family).__name__ in _CLASSES and dataclasses.is_dataclass(family):
        return {"class": type(family).__name__, **dataclasses.asdict(cast(Any, family))}
    return {"own": getattr(family, "__qualname__", type(family).__qualname__)}


def _family_from(name: str, description: dict[str, Any]) -> Family:
    fields = dict(description)
    if "function" in fields:
        return _FUNCTIONS[fields["function"]]
    if "class" in fields:
        family: Family = _CLASSES[fields.pop("class")](**fields)
        return family
    raise ValueError(
        f"the family {name!r} is a function of its author's ({fields['own']}); give the run's "
        "mixture as mixture="
    )
