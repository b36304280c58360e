"""Kills ``taskvec`` at random moments, lets it run again, and looks at what there is then.

python tests/kill_studies.py --times 50            # 4 to 7 minutes on one core
python tests/kill_studies.py --times 5 --fresh     # a new interpreter each time, as from a shell

A round runs one of the commands below in an empty folder, kills it by SIGKILL, looks at every file
that has its final name, runs the command again to its end, and compares the folder with one in
which the command was never disturbed: all files must have the same bytes, but for
``vectors.safetensors``, in which safetensors writes the metadata in random order and which must
hold the same tensors and metadata. Of the kills, one half comes at a random moment of the whole
run, the other half soon after a file has appeared or changed, so as to hit what is written.

A killed process cannot clean up: files and folders named ``.taskvec-*`` or ``*.tmp*`` may stay
behind and are not looked at.

The commands run in processes forked from one that has imported everything and computed nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

COMMANDS = {
    "run": "run --model toy --tasks AND,OR --shots 2 --n 6",
    "bitwise": "study bitwise --model toy --quick",
    "checkpoints": "study checkpoints --model toy --checkpoints 453,1500 --quick",
}
Start = Callable[[Sequence[str]], int]
"""Starts ``taskvec`` with some arguments in a process of its own; returns the process' id."""


@dataclass(frozen=True)
class Straight:
    """What a command leaves when nothing disturbs it, and in how many seconds."""

    command: str
    folder: Path
    seconds: float


def fork(arguments: Sequence[str]) -> int:
    """Run the command in a fork of this process, which must not have computed anything yet."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)
            from transformer_lens_taskvec.cli import app

            app(list(arguments), standalone_mode=False)
            code = 0
        finally:
            os._exit(code)
    return process


def spawn(arguments: Sequence[str]) -> int:
    """Run the command in a new interpreter."""
    command = [sys.executable, "-m", "transformer_lens_taskvec", *arguments]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, **silent).pid


def arguments(command: str, out: Path) -> list[str]:
    return [*COMMANDS[command].split(), "--out", str(out)]


def ended(process: int) -> bool:
    """Whether a child has ended by itself; if it failed, that is an error."""
    pid, status = os.waitpid(process, os.WNOHANG)
    if pid and os.waitstatus_to_exitcode(status):
        raise SystemExit(f"taskvec ended with {os.waitstatus_to_exitcode(status)}")
    return pid != 0


def to_the_end(start: Start, command: str, out: Path) -> Straight:
    started = time.perf_counter()
    _, status = os.waitpid(start(arguments(command, out)), 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"taskvec {COMMANDS[command]} ended with {status} in {out}")
    return Straight(command, out, time.perf_counter() - started)


def kill_at_random(start: Start, straight: Straight, out: Path, rng: random.Random) -> str:
    """Start the command and kill it; says when."""
    aims_at_writing = rng.random() < 0.5
    delay = rng.uniform(0, 0.3 if aims_at_writing else straight.seconds)
    n_changes = rng.randrange(1, 12)
    process = start(arguments(straight.command, out))
    began = time.perf_counter()
    seen: list[tuple[str, int, int]] = []
    while aims_at_writing and n_changes and not ended(process):
        found = files_with_sizes(out)
        n_changes -= found != seen
        seen = found
        time.sleep(0.0005)
    else:
        wait_until = time.perf_counter() + (delay / 12 if aims_at_writing else delay)
    while (alive := process_is_alive(process)) and time.perf_counter() < wait_until:
        time.sleep(0.0005)
    if not alive:
        return "after its end"
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return f"{time.perf_counter() - began:.2f} s after its start"


def process_is_alive(process: int) -> bool:
    try:
        return not ended(process)
    except ChildProcessError:  # it has been waited for
        return False


def files_with_sizes(folder: Path) -> list[tuple[str, int, int]]:
    """All files, half-written ones too, with their sizes and times."""
    found = []
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(OSError):
            stat = path.stat()
            found.append((str(path), stat.st_size, stat.st_mtime_ns))
    return found


def finished_files(folder: Path) -> dict[str, Path]:
    """The files that have their final names."""
    return {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and ".tmp" not in path.name
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def same(one: Path, other: Path) -> bool:
    """Whether two files are the same: bytes, or what is in safetensors."""
    if one.read_bytes() == other.read_bytes():
        return True
    return one.suffix == ".safetensors" and tensors(one) == tensors(other)


def tensors(path: Path) -> tuple[object, bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def differences(folder: Path, straight: Straight, *, complete: bool) -> list[str]:
    """The files that differ from those of the undisturbed run, or are missing if ``complete``.

    What a killed run has written must be the same too, since each file is written once.
    """
    found, expected = finished_files(folder), finished_files(straight.folder)
    problems = [
        f"{name} ({path.stat().st_size} bytes) is not as it should be"
        for name, path in found.items()
        if name not in expected or not same(path, expected[name])
    ]
    missing = set(expected) - set(found) if complete else set()
    return problems + [f"{name} is missing" for name in sorted(missing)]


def one_round(start: Start, straight: Straight, out: Path, rng: random.Random) -> list[str]:
    """Kill, look, run again, compare; returns the problems found."""
    when = kill_at_random(start, straight, out, rng)
    after_kill = [f"after the kill {p}" for p in differences(out, straight, complete=False)]
    to_the_end(start, straight.command, out)
    after_all = [f"after the second run {p}" for p in differences(out, straight, complete=True)]
    return [f"{straight.command} killed {when}: {p}" for p in after_kill + after_all]


def kill_again_and_again(
    times: int,
    *,
    seed: int = 0,
    commands: Sequence[str] = tuple(COMMANDS),
    start: Start = fork,
    report: Callable[[str], object] = print,
) -> list[str]:
    """Rounds of the commands in turn; returns all problems."""
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="taskvec-kills-") as scratch:
        root = Path(scratch)
        straight = [to_the_end(start, name, root / f"straight-{name}") for name in commands]
        for number in range(times):
            began = time.perf_counter()
            of = straight[number % len(straight)]
            rng = random.Random(f"{seed} {number}")
            found = one_round(start, of, root / "killed", rng)
            shutil.rmtree(root / "killed")
            report(f"{number + 1}: {of.command}, {time.perf_counter() - began:.1f} s")
            for problem in found:
                report(f"   {problem}")
            problems += found
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--fresh", action="store_true", help="start a new interpreter each time")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not chosen.fresh:
        import_everything()
    began = time.perf_counter()
    problems = kill_again_and_again(
        chosen.times,
        seed=chosen.seed,
        commands=chosen.commands.split(","),
        start=spawn if chosen.fresh else fork,
    )
    seconds = time.perf_counter() - began
    print(f"{chosen.times} kills in {seconds:.0f} s, {len(problems)} problems")
    return min(len(problems), 1)


def import_everything() -> None:
    """Import what the commands import, so that the forks need not."""
    import matplotlib.pyplot
    import transformers.models.llama.modeling_llama
    from transformer_lens.model_bridge import TransformerBridge

    from transformer_lens_taskvec import cli, experiment, lab, plots
    from transformer_lens_taskvec.analysis import perturbation as analyses
    from transformer_lens_taskvec.paper import runner as paper

    del matplotlib, transformers, TransformerBridge, analyses, cli, experiment, lab, paper, plots


if __name__ == "__main__":
    sys.exit(main())
