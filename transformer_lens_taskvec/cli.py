"""The ``taskvec`` command: a thin layer over the public functions."""

from __future__ import annotations

import copy
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from transformer_lens_taskvec.prompts import PromptTemplate


class _Commands(TyperGroup):
    """Commands that answer a mistake in one line: what is wrong, and what to do."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; the exit code after a mistake is 2."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            problem = error.format_message()
        except KeyError as error:
            problem = str(error.args[0])
        except (ValueError, OSError, ImportError) as error:
            problem = str(error)
        typer.echo(f"taskvec: {' '.join(problem.split())}", err=True)
        raise typer.Exit(2)


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False)

Through = Callable[[Any], Any]
"""What every model goes through before it is used: itself, or what counts in its place."""

LOGGERS = ("tensorboard", "wandb", "trackio")
STUDIES = ("pos", "bitwise", "prompting", "finetune", "checkpoints")
BENCH_TASKS = (
    "antonyms",
    "singular_plural",
    "present_past",
    "present_gerund",
    "country_capital",
    "country_continent",
    "en_fr",
    "es_en",
    "upper_case",
    "first_letter",
    "next_letter",
    "snake_camel",
    "singular_plural+plural_singular",
    "en_fr+fr_en",
)
DEMO_TASKS = (
    "upper_case",
    "singular_plural",
    "present_gerund",
    "present_past",
    "antonyms",
    "next_letter",
    "country_capital",
    "en_fr",
)


def _task_names(incomplete: str) -> list[str]:
    """Return completions of a comma-separated list of tasks, for the shell."""
    from transformer_lens_taskvec.tasks import all_tasks

    done, comma, started = incomplete.rpartition(",")
    return [f"{done}{comma}{name}" for name in all_tasks() if name.startswith(started)]


def _logger_names(incomplete: str) -> list[str]:
    """Return completions of a comma-separated list of loggers, for the shell."""
    done, comma, started = incomplete.rpartition(",")
    return [f"{done}{comma}{name}" for name in LOGGERS if name.startswith(started)]


def _preset_names(incomplete: str) -> list[str]:
    """Return completions of the name of a preset, for the shell."""
    from transformer_lens_taskvec.lab import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


def _version(wanted: bool) -> None:
    if wanted:
        from transformer_lens_taskvec import __version__

        typer.echo(f"taskvec {__version__}")
        raise typer.Exit


def _folder(out: Path) -> Path:
    """Return a folder that can be made and written to, without making it."""
    try:
        nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        problem = f"the folder {out} cannot be written to ({error.strerror}). Choose another."
        raise typer.BadParameter(problem) from error
    return out


def _device(name: str | None) -> str | None:
    """Return the name of a device that can be used."""
    if name is None:
        return None
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        can = "'cpu' or 'cuda'" if torch.cuda.is_available() else "'cpu': there is no CUDA here"
        raise typer.BadParameter(f"{name!r} cannot be used. Use {can}.") from error
    return name


Out = Annotated[
    Path,
    typer.Option(help="Folder for results.json, the vectors and the figures.", callback=_folder),
]
Model = Annotated[
    str,
    typer.Option(
        help="'smollm2', 'gemma3-270m', 'toy', any TransformerLens name, or a .gguf path.",
        autocompletion=lambda: ["smollm2", "gemma3-270m", "toy"],
    ),
]
Shots = Annotated[int, typer.Option(min=0, help="Demonstrations in a few-shot prompt.")]
Count = Annotated[
    int, typer.Option(min=1, help="Episodes per task in each of the train, dev and test sets.")
]
TestCount = Annotated[
    int | None, typer.Option(min=1, help="Episodes per task in the test set; by default as --n.")
]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**32 - 1, help="Seed; the same seed gives the same results."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Say what it would run, and how long it would take. Write nothing."
    ),
]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Prepend a BOS token; by default as the tokenizer does."),
]


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    """Task vectors in language models: extract, inject, measure.

    Example: taskvec demo --out demo
    """


@app.command()
def demo(
    out: Out = Path("taskvec-demo"),
    n_test: TestCount = 100,
    seed: Seed = 0,
    dry_run: DryRun = False,
) -> None:
    """Measure eight task vectors in SmolLM2-135M-Instruct.

    Example: taskvec demo --out demo
    """
    run(",".join(DEMO_TASKS), n_test=n_test, seed=seed, out=out, dry_run=dry_run)


@app.command()
def run(
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated task names; 'taskvec tasks' lists them.",
            autocompletion=_task_names,
        ),
    ],
    model: Model = "smollm2",
    shots: Shots = 8,
    n: Count = 40,
    n_test: TestCount = None,
    seed: Seed = 0,
    bos: Bos = None,
    out: Out = Path("taskvec-run"),
    dry_run: DryRun = False,
) -> None:
    """Measure task vectors of chosen tasks in any model.

    Example: taskvec run --model gpt2 --tasks upper_case,en_fr --shots 5 --out gpt2
    """
    from transformer_lens_taskvec.experiment import Experiment, run_experiment
    from transformer_lens_taskvec.loading import load_model
    from transformer_lens_taskvec.tasks import find_tasks

    chosen = find_tasks(_names(tasks))
    typer.echo(f"loading {model} ...")

    def work(through: Through, folder: Path) -> tuple[Experiment, list[Path]]:
        from transformer_lens_taskvec.plots import experiment_figures, part_figure, save_figures

        def draw(name: str, part: Any) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in save_figures({name: part_figure(name, part)}, folder):
                if not dry_run:
                    typer.echo(f"wrote {path}")

        found = run_experiment(
            through(load_model(model)),
            chosen,
            n_shots=shots,
            n=n,
            n_test=n_test,
            seed=seed,
            template=_template(bos),
            report=draw,
            progress=not dry_run,
        )
        return found, [*found.save(folder), *save_figures(experiment_figures(found), folder)]

    if dry_run:
        _say(work)
        typer.echo("included: the texts of the injected answers, as if all of them were wrong")
        return
    result, paths = work(_as_it_is, out)
    frame = result.to_frame()
    typer.echo(frame.to_string(index=False, float_format="{:.2f}".format))
    typer.echo("\naccuracy with each control in place of the task's vector:")
    controls = result.comparison.table().reset_index()
    typer.echo(controls.to_string(index=False) + "\n")
    typer.echo("wrong answers with each task's vector, by kind:")
    errors = result.errors.to_frame().drop(columns=["low", "high"])
    typer.echo(errors.to_string(index=False, float_format="{:.2f}".format) + "\n")
    best = result.decodability.best_layer()
    typer.echo(
        f"task decodability peaks at layer {best}: {float(result.decodability.mean.max()):.2f} "
        f"(chance {result.decodability.chance:.2f})"
    )
    for path in paths:
        typer.echo(f"wrote {path}")


@app.command()
def bench(
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated task names; 'taskvec tasks' lists them.",
            autocompletion=_task_names,
        ),
    ] = ",".join(BENCH_TASKS),
    model: Model = "smollm2",
    methods: Annotated[
        str, typer.Option(help="Comma-separated methods; 'extracted', 'learned' or 'all'.")
    ] = "extracted",
    controls: Annotated[
        str, typer.Option(help="Comma-separated controls; gains are over the first.")
    ] = "shuffled labels,random",
    shots: Shots = 5,
    n: Annotated[int, typer.Option(min=1, help="Training episodes per task.")] = 25,
    n_dev: Annotated[int, typer.Option(min=1, help="Dev queries per task.")] = 20,
    n_test: Annotated[int, typer.Option(min=1, help="Test queries per task.")] = 100,
    seed: Seed = 0,
    bos: Bos = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for results.json and the figure; an interrupted run is resumed.",
            callback=_folder,
        ),
    ] = Path("taskvec-bench"),
) -> None:
    """Compare methods of making task vectors, each with its own control.

    Example: taskvec bench --tasks singular_plural,en_fr --methods mean,contrast --out bench
    """
    from transformer_lens_taskvec.benchmark import METHODS, compare_methods
    from transformer_lens_taskvec.loading import load_model
    from transformer_lens_taskvec.plots import figure_of, plot_methods, save_figures
    from transformer_lens_taskvec.tasks import find_tasks

    groups = {
        "all": [*METHODS],
        "extracted": [name for name, one in METHODS.items() if not one.learned],
        "learned": [name for name, one in METHODS.items() if one.learned],
    }
    wanted = [name for part in _names(methods) for name in groups.get(part, [part])]
    chosen = find_tasks(_names(tasks))
    typer.echo(f"loading {model} ...")

    def say(unit: Mapping[str, Any]) -> None:
        if "error" in unit:
            return
        control, other = next(iter(unit["controls"].items()))
        typer.echo(
            f"{unit['method']:18} {unit['task']:18} {unit['accuracy']:.2f} "
            f"[{unit['low']:.2f}, {unit['high']:.2f}], {control} {other['accuracy']:.2f} "
            f"(layer {unit['layer']}, {unit['seconds']:.0f} s)"
        )

    found = compare_methods(
        load_model(model),
        chosen,
        methods=list(dict.fromkeys(wanted)),
        controls=_names(controls),
        n_shots=shots,
        n=n,
        n_dev=n_dev,
        n_test=n_test,
        seed=seed,
        template=_template(bos),
        out=out,
        report=say,
        progress=True,
    )
    typer.echo(found.headline)
    typer.echo(repr(found))
    for path in save_figures({"methods": figure_of(plot_methods(found))}, out):
        typer.echo(f"wrote {path}")
    typer.echo(f"wrote {out / 'results.json'}")


@app.command()
def dictionary(
    out: Annotated[Path, typer.Option(help="A .safetensors file for the dictionary.")],
    layer: Annotated[int, typer.Option(min=0, help="The layer, counted from 0.")],
    model: Model = "smollm2",
    data: Annotated[
        Path | None,
        typer.Option(help="More sentences: a CoNLL-U file or a Penn Treebank folder.", exists=True),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on.")] = 100_000,
    features: Annotated[
        int | None, typer.Option(min=1, help="Features; eight per dimension by default.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 1,024 tokens.")] = 1000,
    seed: Seed = 0,
) -> None:
    """Train a small dictionary (sparse autoencoder) on a model's residual stream.

    Example: taskvec dictionary --layer 14 --out layer14.safetensors
    """
    from transformer_lens_taskvec.loading import load_model
    from transformer_lens_taskvec.paper.runner import read_sentences
    from transformer_lens_taskvec.prompts import sample_episodes
    from transformer_lens_taskvec.tasks import find_tasks
    from transformer_lens_taskvec.vectors import residuals, train_dictionary

    _folder(out.parent)
    chosen = find_tasks(DEMO_TASKS)
    texts: list[Any] = [
        episode
        for shots in (0, 2, 8)
        for episode in sample_episodes(chosen, n=100, n_shots=shots, seed=seed)
    ]
    if data is not None:
        texts += [sentence.text for sentence in read_sentences(data)]
    typer.echo(f"loading {model} ...")
    found = residuals(load_model(model), texts, layer, tokens, seed=seed, progress=True)
    typer.echo(repr(found))

    def say(step: int, loss: float) -> None:
        if step % 100 == 0:
            typer.echo(f"step {step}: loss {loss:.4f}")

    trained = train_dictionary(found, n_features=features, steps=steps, seed=seed, report=say)
    trained.save(out)
    typer.echo(f"wrote {out}: {trained!r}")


@app.command()
def tasks() -> None:
    """List the tasks by family, each with an example.

    Example: taskvec tasks
    """
    import random

    from transformer_lens_taskvec.tasks import FAMILIES

    for family in FAMILIES:
        typer.echo(f"{family.name}: {family.description}")
        for name, task in family.make().items():
            example = task.sample(1, random.Random(0))[0]
            typer.echo(f"  {name:22} {example.x} -> {example.y}")


@app.command()
def study(
    kind: Annotated[
        str,
        typer.Argument(
            help="'pos', 'bitwise', 'prompting', 'finetune' or 'checkpoints'.",
            autocompletion=lambda: [*STUDIES],
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for results.json, report.md and figures.", callback=_folder),
    ],
    model: Model = "smollm2",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Sentences for 'pos' and 'prompting': a CoNLL-U file or a Penn Treebank folder.",
            exists=True,
        ),
    ] = None,
    checkpoints: Annotated[
        str, typer.Option(help="For 'checkpoints': comma-separated steps or revisions.")
    ] = "",
    samples: Annotated[
        int, typer.Option(min=6, help="For 'finetune': number of training episodes.")
    ] = 10_000,
    quick: Annotated[bool, typer.Option("--quick", help="20 episodes per task, not 100.")] = False,
    seed: Seed = 0,
    bos: Bos = None,
    dry_run: DryRun = False,
) -> None:
    """Run the paper's experiments on a pretrained model.

    Example: taskvec study bitwise --model smollm2 --quick --out bitwise
    """
    options = {
        "n": 20 if quick else 100,
        "seed": seed,
        "template": _template(bos),
        "progress": not dry_run,
    }
    steps = _names(checkpoints)
    samples = 240 if quick else samples

    def work(through: Through, folder: Path) -> list[Path]:
        return _write_study(kind, model, folder, data, steps, samples, through, **options)

    if dry_run:
        _say(work)
        if kind == "finetune":
            _say_of_finetuning(model, samples, seed)
        return
    paths = work(_as_it_is, out)
    typer.echo((out / "report.md").read_text())
    for path in paths:
        typer.echo(f"wrote {path}")


def _write_study(
    kind: str,
    model: str,
    out: Path,
    data: Path | None,
    checkpoints: list[str],
    samples: int,
    through: Through,
    **options: Any,
) -> list[Path]:
    """Load what the study needs, run it, and return the files written."""
    from transformer_lens_taskvec.loading import load_checkpoint, load_hf_model, load_model
    from transformer_lens_taskvec.models.bridge import bridge_from_hf
    from transformer_lens_taskvec.paper import LoraSettings, runner

    sentences = None if data is None else runner.read_sentences(data)
    if kind in ("pos", "bitwise"):
        loaded = through(load_model(model))
        return runner.write_shot_study(loaded, kind, out, sentences=sentences, **options)
    if kind == "prompting":
        loaded = through(load_model(model))
        return runner.write_instruction_study(loaded, out, sentences=sentences, **options)
    if kind == "finetune":
        hf_model, tokenizer = load_hf_model(model)
        if through is not _as_it_is:
            for _ in ("pretrained", "first layers", "last layers"):
                loaded = through(bridge_from_hf(hf_model, tokenizer))
                runner.study_finetuned(loaded, **options)
            return []
        settings = LoraSettings(n_samples=samples)
        return runner.write_finetuning_study(hf_model, tokenizer, out, settings=settings, **options)
    if kind != "checkpoints":
        raise ValueError(f"no study {kind!r}; there are: {', '.join(STUDIES)}")
    steps: list[int | str] = [int(part) if part.isdigit() else part for part in checkpoints]
    shots = (1, 4, 10)
    if model == "toy":
        from transformer_lens_taskvec.lab import shipped_toy_run

        steps = steps or [*shipped_toy_run().steps]
        shots = (1, 4, 8)  # it was trained on at most eight demonstrations

    def load(checkpoint: int | str) -> Any:
        # All checkpoints cost the same, so one of them is enough to count.
        first = checkpoint if through is _as_it_is else steps[0]
        return through(load_checkpoint(model, first))

    return runner.write_checkpoint_study(model, steps, out, load=load, shots=shots, **options)


@app.command()
def train(
    out: Annotated[
        Path,
        typer.Option(help="Folder of the run; an interrupted run is resumed.", callback=_folder),
    ],
    preset: Annotated[
        str | None,
        typer.Option(
            help="The name of a preset, such as 'small', 'paper' or 'toy'; 'small' by default.",
            autocompletion=_preset_names,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="The config.json of a run, in place of a preset. Other options override it.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; the preset's by default.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**32 - 1, help="Seed of weights and data; 0 by default."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="'cpu' or 'cuda'; CUDA if available.", callback=_device)
    ] = None,
    autocast: Annotated[
        bool | None, typer.Option("--autocast/--no-autocast", help="Compute in bfloat16.")
    ] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the model first.")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="End after so many evaluations without a lower late loss."),
    ] = None,
    logger: Annotated[
        str,
        typer.Option(
            help="Comma-separated: 'tensorboard', 'wandb', 'trackio'.",
            autocompletion=_logger_names,
        ),
    ] = "",
    dry_run: DryRun = False,
) -> None:
    """Train a small transformer in which task vectors emerge.

    Example: taskvec train --preset small --out runs/small
    """
    from transformer_lens_taskvec import lab

    if config is not None and preset is not None:
        raise typer.BadParameter("give --preset or --config, not both")
    arguments: dict[str, Any] = {"config": preset or "small"}
    if config is not None:
        arguments = lab.load_config(config)
    given: dict[str, Any] = {
        "seed": seed,
        "steps": steps,
        "device": device,
        "autocast": autocast,
        "compile": compiled,
    }
    arguments |= {name: value for name, value in given.items() if value is not None}
    _device(arguments.get("device"))
    if patience is not None:
        stop = arguments.get("stop") or lab.EarlyStopping(patience)
        arguments["stop"] = replace(stop, patience=patience)
    if dry_run:
        for line in lab.plan_training(**arguments).lines:
            typer.echo(line)
        return
    run = lab.train(out_dir=out, loggers=_loggers(_names(logger), out, arguments), **arguments)
    typer.echo(repr(run))
    if isinstance(run, lab.Run):
        typer.echo(f"measure and draw it with: taskvec emergence {out}")


def _loggers(names: list[str], out: Path, arguments: Mapping[str, Any]) -> list[Any]:
    """Return the loggers of these names; a run that is resumed is resumed in a service too."""
    from transformer_lens_taskvec import lab

    # The same settings in the same folder are the same run, to the bit.
    number = zlib.crc32(f"{out.resolve()} {arguments}".encode())
    resumable = {"id": f"{number:08x}", "name": out.name, "dir": str(out), "resume": "allow"}
    make: dict[str, Callable[[], Any]] = {
        "tensorboard": lambda: lab.TensorBoardLogger(out),
        "wandb": lambda: lab.WandbLogger("taskvec", **resumable),
        "trackio": lambda: lab.TrackioLogger(
            "taskvec", name=f"{out.name}-{number:08x}", resume="allow"
        ),
    }
    for name in names:
        if name not in make:
            raise ValueError(f"no logger {name!r}; there are: {', '.join(LOGGERS)}")
    return [make[name]() for name in names]


@app.command()
def emergence(
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a run of 'taskvec train'; a built-in run by default."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for emergence.json and the figures.", callback=_folder)
    ] = Path("taskvec-emergence"),
    n: Annotated[int, typer.Option(min=11, help="Sequences per task.")] = 100,
    seed: Seed = 0,
    dry_run: DryRun = False,
) -> None:
    """Measure and draw a run: errors, decodability, swaps, ablated heads, its problem's finding.

    Example: taskvec emergence runs/small --out figures
    """
    from transformer_lens_taskvec import lab
    from transformer_lens_taskvec.plots import save_figures

    loaded = lab.shipped_run() if run is None else lab.load_run(run)

    def work(through: Through, folder: Path) -> tuple[list[Any], list[Path]]:
        through_it = copy.copy(loaded)
        make = lambda step=None: through(loaded.model(step))  # noqa: E731
        object.__setattr__(through_it, "model", make)
        results: list[Any] = []
        paths: list[Path] = []
        has_finding = isinstance(loaded, lab.Run) and (
            type(loaded.config.problem).finding is not lab.Problem.finding
        )
        if len(loaded.tasks) > 1 or not has_finding:  # with one task there is nothing to decode
            found = lab.measure_emergence(through_it, n=n, seed=seed, progress=not dry_run)
            figures = lab.emergence_figures(through_it, found, n=n)
            results, paths = [found], [found.save(folder), *save_figures(figures, folder)]
        if has_finding:
            finding = loaded.config.problem.finding(through_it)
            results, paths = [*results, finding], [*paths, *finding.save(folder)]
        return results, paths

    if dry_run:
        return _say(work)
    results, paths = work(_as_it_is, out)
    for result in results:
        typer.echo(repr(result))
    for path in paths:
        typer.echo(f"wrote {path}")


def _as_it_is(model: Any) -> Any:
    return model


def _say(work: Callable[[Through, Path], Any]) -> None:
    """Say what a command would run."""
    from transformer_lens_taskvec.planning import plan_job

    for line in plan_job(work).lines:
        typer.echo(line)


def _say_of_finetuning(model: str, samples: int, seed: int) -> None:
    from transformer_lens_taskvec.loading import load_hf_model
    from transformer_lens_taskvec.paper import LoraSettings
    from transformer_lens_taskvec.paper.finetune import training_tokens
    from transformer_lens_taskvec.tasks import bitwise_tasks

    _, tokenizer = load_hf_model(model)
    tokens = training_tokens(tokenizer, bitwise_tasks(), LoraSettings(n_samples=samples), seed)
    typer.echo(
        f"not included: finetuning on {tokens:,} tokens, each of which costs about three times a "
        "token above, and more memory"
    )


def _names(text: str) -> list[str]:
    """Return the parts of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _template(bos: bool | None) -> PromptTemplate:
    from transformer_lens_taskvec.prompts import EXAMPLE_ARROW

    return replace(EXAMPLE_ARROW, bos=bos)
