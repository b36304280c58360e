"""The paper's model and recipe: trained, timed against its matrix products, compared with oracles.

python tutorials/lab_paper.py --out runs/paper

trains the `paper` preset on CUDA with bfloat16 autocast and a compiled model (run it again to
resume an interrupted training), and writes paper.md, a table, and paper.json to the folder. Without
CUDA it runs on the CPU, where 80,000 steps take days; --steps and --batch-size make it smaller.

The bound of a step is the time of its matrix products alone, forward and backward, each measured by
itself on the same device in the same precision and memory layout. Attention counts as the products
that it consists of, two forward and four backward, by half, because it is causal.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transformer_lens_taskvec import lab
from transformer_lens_taskvec._utils.atomic_io import write_text
from transformer_lens_taskvec.lab.training.loop import _matmul_precision, training_step

MODES = ((False, False), (True, False), (True, True))
"""Autocast, and compiled: what a step is timed with. The last is what the training runs with."""


class Operand(NamedTuple):
    """What determines how fast a matrix is read."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        """That of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    @classmethod
    def plain(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Operand:
        """That of a new tensor."""
        return cls.of(torch.empty(shape, dtype=dtype, device="meta"))

    def random(self, device: torch.device) -> Tensor:
        """A tensor like it."""
        pairs = zip(self.shape, self.stride, strict=True)
        size = 1 + sum((n - 1) * stride for n, stride in pairs)
        return torch.randn(size, device=device).to(self.dtype).as_strided(self.shape, self.stride)


Product = tuple[Operand, Operand]
Counts = dict[Product, float]
"""How often each product runs; a half is one of which half is needed."""


class Products(TorchDispatchMode):
    """Counts the matrix products that run, by their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.counts[Operand.of(args[0]), Operand.of(args[1])] += 1
        elif name in ("addmm", "baddbmm"):
            self.counts[Operand.of(args[1]), Operand.of(args[2])] += 1
        elif name.startswith("_scaled_dot_product"):
            self._attention(args[1] if "backward" in name else args[0], "backward" in name)
        return func(*args, **(kwargs or {}))

    def _attention(self, query: Tensor, backward: bool) -> None:
        """Half of two products, or of four: of queries and keys, and of patterns and values."""
        batch, heads, pos, d_head = query.shape
        wide, tall, square = (
            Operand.plain((batch * heads, *shape), query.dtype)
            for shape in ((pos, d_head), (d_head, pos), (pos, pos))
        )
        for product in ((wide, tall), (square, wide)):
            self.counts[product] += 1.0 if backward else 0.5


def products_of(step: Callable[[], Any]) -> Counts:
    """The matrix products of a call."""
    with Products() as products:
        step()
    return products.counts


def flops(counts: Counts) -> float:
    """The additions and multiplications of some products."""
    return sum(2.0 * n * torch.Size(a.shape).numel() * b.shape[-1] for (a, b), n in counts.items())


def bound(counts: Counts, device: torch.device) -> float:
    """The seconds that some products take, each measured alone."""
    return sum(n * seconds_of(a.random(device), b.random(device)) for (a, b), n in counts.items())


def seconds_of(a: Tensor, b: Tensor, *, least: float = 0.02) -> float:
    """The seconds of a matrix product, the best of five measurements of ``least`` seconds."""
    run = lambda: a @ b  # noqa: E731
    per_call = seconds(run, 3, a.device)
    often = max(1, int(least / per_call))
    return min(seconds(run, often, a.device) for _ in range(5))


def seconds(run: Callable[[], Any], often: int, device: torch.device) -> float:
    """The mean seconds of a call in a row of calls; the host waits for the device only in the end.

    One call before it is not timed.
    """
    run()
    _wait(device)
    started = time.perf_counter()
    for _ in range(often):
        run()
    _wait(device)
    return (time.perf_counter() - started) / often


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(
    config: lab.TrainConfig, device: torch.device, modes: Sequence[tuple[bool, bool]], often: int
) -> list[dict[str, Any]]:
    """The time of a training step in each mode, and its bound."""
    rows = []
    with _matmul_precision(device):
        for autocast, compiled in modes:
            how: dict[str, Any] = {"seed": 0, "device": device, "autocast": autocast}
            counts = products_of(training_step(config, **how))
            least = bound(counts, device)
            step = training_step(config, **how, compile=compiled)
            for _ in range(3):
                step()
            took = min(seconds(step, often, device) for _ in range(3))
            row = {
                "precision": "bfloat16" if autocast else "float32",
                "compiled": compiled,
                "step_ms": 1e3 * took,
                "bound_ms": 1e3 * least,
                "over_bound": took / least,
                "tflops": flops(counts) / took / 1e12,
            }
            rows.append(row)
            print(row)
    return rows


def report(
    config: lab.TrainConfig,
    out: Path,
    *,
    seed: int,
    device: torch.device,
    modes: Sequence[tuple[bool, bool]] = MODES,
    often: int = 30,
    n_oracle: int = 10_000,
) -> dict[str, Any]:
    """Time the steps, train, write the table and return what is in it."""
    timed = time_steps(config, device, modes, often)
    autocast, compiled = modes[-1]
    run = lab.train(config, out, seed=seed, device=device, autocast=autocast, compile=compiled)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    oracles = lab.oracle_errors(config.problem, n_sequences=n_oracle)
    late = dict(zip(run.tasks, run.late_loss[-1].tolist(), strict=True))
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch_size": config.batch_size,
        "seed": seed,
        "steps": run.steps[-1],
        "minutes": last["seconds"] / 60,
        "step": timed,
        "late_error": late,
        "oracles": {name: oracles.late(name) for name in oracles.names},
        "best_oracle": oracles.best,
        "over_best": sum(late.values()) / len(late) / oracles.late(oracles.best),
    }
    write_text(out / "paper.json", json.dumps(found, indent=1) + "\n")
    write_text(out / "paper.md", markdown(found))
    return found


def markdown(found: dict[str, Any]) -> str:
    """The tables of times and of errors."""
    lines = [
        f"{found['device']}, torch {found['torch']}, {found['threads']} threads, batches of "
        f"{found['batch_size']}; {found['steps']:,} steps in {found['minutes']:,.1f} minutes, "
        f"seed {found['seed']}.",
        "",
        "| precision | compiled | step, ms | matrix products alone, ms | step / bound | TFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['precision']} | {'yes' if row['compiled'] else 'no'} | {row['step_ms']:.2f} "
        f"| {row['bound_ms']:.2f} | {row['over_bound']:.2f} | {row['tflops']:.3g} |"
        for row in found["step"]
    ]
    lines += ["", "| late squared error of | |", "|---|---|"]
    lines += [
        f"| the model on {task} | {error:.4f} |" for task, error in found["late_error"].items()
    ]
    lines += [f"| {name} | {error:.4f} |" for name, error in found["oracles"].items()]
    lines += [f"| the model's mean / {found['best_oracle']} | {found['over_best']:.2f} |"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Time, train and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="in place of the preset's")
    parser.add_argument("--batch-size", type=int, help="in place of the preset's")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args()
    changed = {"steps": args.steps, "batch_size": args.batch_size}
    config = dataclasses.replace(
        lab.PRESETS["paper"], **{name: value for name, value in changed.items() if value}
    )
    device = torch.device(args.device)
    report(
        config,
        args.out,
        seed=args.seed,
        device=device,
        modes=[mode for mode in MODES if not (args.eager and mode[1])],
        often=30 if device.type == "cuda" else 3,
    )
    print((args.out / "paper.md").read_text())


if __name__ == "__main__":
    main()
