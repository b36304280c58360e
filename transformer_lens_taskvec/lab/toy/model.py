"""The toy model: a small language model that infers bitwise tasks from a few demonstrations.

It is a Llama of four layers and width 64. A sequence is nine lines ``example:01011 11010->01010``;
the loss is on the answers. Half of the sequences begin with a beginning-of-sequence token. The
arrow ``->`` is the token before an answer, where task vectors are extracted. There are three kinds
of sequences, which differ in what an arrow sees:

- *plain*: lines of one task. Every token sees all tokens before it, as it does after training.
- *by arrow*: lines of one task. Every token sees its own line only, except the arrows, which in the
  lower half of the layers see the earlier lines instead.
- *two tasks*: each line is of one of two tasks. In the lower half of the layers its arrow sees the
  earlier lines of the same task; everything else is as in a plain sequence.

In the last two kinds the answer gets the task only through its arrow's residual stream halfway up,
which has no information about the query yet. So the model learns to read the task from the
demonstrations first and to look at the query afterwards. This is a design choice, not a finding.
The same model trained on plain sequences alone answers as well after four demonstrations, and its
task is decodable at the arrow, but injecting the mean of its arrows has no effect. Trained without
sequences of two tasks, it performs the task from the mean, but a wrong task's mean in a few-shot
prompt leaves many answers right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from einops import reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from transformer_lens_taskvec.activations import Activations, Source
from transformer_lens_taskvec.analysis.decodability import task_decodability
from transformer_lens_taskvec.lab.model import check_size
from transformer_lens_taskvec.lab.problems.base import balanced_labels
from transformer_lens_taskvec.lab.toy.lines import (
    ARROW,
    BOS,
    LINE,
    LINES,
    PAD,
    TASKS,
    TWO_TASKS,
    VOCABULARY_SIZE,
    additive_mask,
    answer_nll,
    bitwise_lines,
    causal_view,
    draw_labels,
    exact_match,
    toy_tokenizer,
    training_view,
)
from transformer_lens_taskvec.lab.training.recipe import Recipe, stacked, stopped_in
from transformer_lens_taskvec.lab.training.runs import TrainingRun, load_run
from transformer_lens_taskvec.models.bridge import bridge_from_hf

_EVAL_SEED = 3_000_003
_SHOTS_OF_TD = 4


@dataclass(frozen=True)
class ToyConfig(Recipe):
    """The settings of the toy model's training, besides those of :class:`Recipe`.

    Attributes:
        d_mlp: Width of an MLP's hidden layer.
        by_arrow: The share of sequences in which only the arrows see other lines.
        two_tasks: The share of sequences with lines of two tasks; the rest are plain.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> sum(weights.numel() for weights in lab.ToyConfig().llama().parameters())
        177344
    """

    steps: int = 1_500
    batch_size: int = 32
    optimizer: Literal["adam", "muon"] = "muon"
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    muon_learning_rate: float = 5e-3
    warmup: int = 100
    schedule: Literal["constant", "cosine"] = "cosine"
    n_checkpoints: int = 16
    n_eval: int = 50
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 64
    d_mlp: int = 128
    by_arrow: float = 0.4
    two_tasks: float = 0.3

    loss_name: ClassVar[str] = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self, "d_mlp")
        if min(self.by_arrow, self.two_tasks) < 0 or self.by_arrow + self.two_tasks > 1:
            raise ValueError(
                f"by_arrow={self.by_arrow} and two_tasks={self.two_tasks} must be shares that "
                "sum to 1 or less"
            )

    def model(self, *, seed: int = 0, device: torch.device | str = "cpu") -> Any:
        """An untrained Llama, as :meth:`llama`, that takes a mask for each half of its layers.

        A mask ``[batch, 2, query, key]`` holds that of the lower layers and that of the upper ones.
        """
        model = self.llama(seed=seed)
        for number, layer in enumerate(model.model.layers):
            half = int(number >= self.n_layers // 2)
            layer.register_forward_pre_hook(partial(_take_half, half), with_kwargs=True)
        return model.to(device)

    def llama(self, *, seed: int = 0) -> Any:
        """An untrained Hugging Face Llama of this size."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_heads,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=None,
            pad_token_id=PAD,
        )
        config.architectures = ["LlamaForCausalLM"]
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model = model.to_empty(device="cpu")
        # Rotary frequencies are buffers, which have no values on the "meta" device.
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, self._initial_scale(name), generator=generator)
        return model

    def _initial_scale(self, name: str) -> float:
        scale = 0.6 / math.sqrt(self.d_model)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return 0.05 * scale
        return 0.2 * scale if name == "lm_head.weight" else scale

    def checkpoint_steps(self) -> tuple[int, ...]:
        """0, then a geometric series from a twentieth of the run on; little happens earlier."""
        gaps = max(1, self.n_checkpoints - 1)
        series = {round(self.steps * 20 ** (i / gaps - 1)) for i in range(gaps + 1)}
        return tuple(sorted({0, *series}))

    def matrices(self, model: Any) -> list[nn.Parameter]:
        """The blocks' weight matrices."""
        return [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]

    def loss(
        self,
        model: Any,
        forward: Callable[..., Any],
        generator: torch.Generator,
        autocast: bool,
    ) -> Tensor:
        """The NLL in nats of an answer's token, newline included, over a new batch."""
        device = generator.device
        plain = max(0.0, 1 - self.by_arrow - self.two_tasks)
        kinds = torch.tensor([plain, self.by_arrow, self.two_tasks], device=device)
        kind = torch.multinomial(kinds, self.batch_size, True, generator=generator)
        with_bos = torch.randint(2, (self.batch_size,), generator=generator, device=device).bool()
        labels = draw_labels(kind == TWO_TASKS, generator)
        tokens = bitwise_lines(labels, generator)
        mask = additive_mask(training_view(kind, labels), with_bos)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = forward(tokens, attention_mask=mask).logits
        nll: Tensor = answer_nll(logits.float(), tokens).mean()
        return nll

    def evaluate(self, model: Any) -> dict[str, Any]:
        """NLL by task, exact match by task and shots, the operators' TD by layer at four shots."""
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(_EVAL_SEED)
        labels = balanced_labels(len(TASKS), self.n_eval, device)
        tokens = bitwise_lines(repeat(labels, "batch -> batch line", line=LINES), generator)
        view = causal_view(device)[None, None]
        nll, right, points = [], [], []
        with torch.no_grad(), _keeping_arrows(model) as kept:
            for rows in torch.arange(len(labels), device=device).split(128):
                mask = additive_mask(view, torch.zeros_like(rows, dtype=torch.bool))
                logits = model(tokens[rows], attention_mask=mask).logits
                by_token = answer_nll(logits, tokens[rows])
                nll.append(reduce(by_token, "batch line at -> batch", "mean"))
                right.append(exact_match(logits, tokens[rows]))
                points.append(torch.stack([kept.pop(0) for _ in model.model.layers], dim=1))

        def mean(values: list[Tensor]) -> Any:
            per_task = "(task each) ... -> task ..."
            return reduce(torch.cat(values).float(), per_task, "mean", each=self.n_eval).tolist()

        return {
            "nll": mean(nll),
            "accuracy": mean(right),
            "td": _decodability(torch.cat(points), labels.cpu()).tolist(),
        }

    def task_losses(self, record: Mapping[str, Any]) -> dict[str, float]:
        """The NLL of each task."""
        return dict(zip(TASKS, record["nll"], strict=True))

    def summary(self, record: dict[str, Any]) -> str:
        """Accuracy and TD at four shots."""
        accuracy = fmean(shots[_SHOTS_OF_TD] for shots in record["accuracy"][:-1])
        return f"accuracy {accuracy:.2f} TD {max(map(fmean, record['td'])):.2f}"

    def fewest_weights(self) -> int:
        """The weights of the blocks' matrices."""
        return self.n_layers * (4 * self.d_model + 3 * self.d_mlp) * self.d_model

    def run(self, path: Path, seed: int, records: list[dict[str, Any]]) -> ToyRun:
        """The run in a folder, given its evaluations."""
        measured = stacked(
            records,
            nll=(len(TASKS),),
            accuracy=(len(TASKS), LINES),
            td=(self.n_layers, len(TASKS) - 1),
        )
        steps = tuple(record["step"] for record in records)
        return ToyRun(path, self, seed, steps, **measured, stopped=stopped_in(records))


@dataclass(frozen=True, repr=False)
class ToyRun(TrainingRun):
    """A :class:`TrainingRun` of the toy model.

    Attributes:
        nll: NLL of an answer's token in nats, ``[checkpoint, task]``.
        accuracy: Exact match by number of demonstrations from 0, ``[checkpoint, task, shots]``.
        td: TD of the six operators at the last prompt token after four demonstrations,
            ``[checkpoint, layer, operator]``.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> run = lab.shipped_toy_run()
        >>> by_shots = run.accuracy[-1, :6].mean(dim=0)  # the six operators
        >>> bool(by_shots[0] < 0.4), round(float(by_shots[4]), 1)
        (True, 1.0)
    """

    config: ToyConfig
    nll: Float[Tensor, "checkpoint task"]
    accuracy: Float[Tensor, "checkpoint task shots"]
    td: Float[Tensor, "checkpoint layer operator"]

    _table: ClassVar[tuple[str, str]] = ("accuracy", "shots")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The six operators, and Null."""
        return TASKS

    def model(self, step: int | None = None, **kwargs: Any) -> Any:
        """As for :meth:`Run.model`, as a ``TransformerBridge``.

        Args:
            step: The checkpoint.
            **kwargs: Passed to ``TransformerBridge.boot_transformers`` (``device``, ...).
        """
        hf_model, name = self.restored(step, self.config.llama)
        hf_model.config.name_or_path = name
        return bridge_from_hf(hf_model, kwargs.pop("tokenizer", None) or toy_tokenizer(), **kwargs)

    def _summary(self) -> str:
        shots = self.accuracy[-1, :-1].mean(0)
        return (
            f"; operators at 1, 4, 8 shots {float(shots[1]):.2f}, {float(shots[4]):.2f}, "
            f"{float(shots[8]):.2f}, TD {float(self.td[-1].mean(-1).max()):.2f}"
        )


def shipped_toy_run() -> ToyRun:
    """Return the run that ships with the package; its last checkpoint is the toy model.

    ``taskvec train --preset toy`` retrains it. The shipped weights are float16.

    Example:
        >>> from transformer_lens_taskvec import lab
        >>> lab.shipped_toy_run().model().cfg.n_layers  # the same as load_model("toy")
        4
    """
    run: ToyRun = load_run(Path(__file__).parents[1] / "shipped" / "toy")
    return run


def _take_half(half: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Give a layer its half of a two-part attention mask, and any other mask unchanged."""
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.shape[1] == 2:
        kwargs["attention_mask"] = mask[:, half : half + 1]
    return args, kwargs


@contextmanager
def _keeping_arrows(model: Any) -> Iterator[list[Float[Tensor, "batch d_model"]]]:
    """A list that fills with the residual stream after each layer, at the fifth arrow."""
    kept: list[Tensor] = []
    arrow = 1 + _SHOTS_OF_TD * LINE + ARROW
    with ExitStack() as hooks:
        for layer in model.model.layers:
            hook = layer.register_forward_hook(
                lambda layer, args, output: kept.append(output[:, arrow].float().cpu())
            )
            hooks.enter_context(hook)
        yield kept


def _decodability(
    points: Float[Tensor, "example layer d"], labels: Int[Tensor, " example"]
) -> Float[Tensor, "layer operator"]:
    operators = tuple(task for task in TASKS if task != "Null")
    chosen = labels < len(operators)
    source = Source("toy", "resid_post", -1, "example:{x}->{y}", bos=False)
    layers = tuple(range(points.shape[1]))
    activations = Activations(points[chosen], labels[chosen], operators, layers, source)
    return task_decodability(activations).scores
