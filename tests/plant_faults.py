"""Plants one-line faults, one at a time, in a copy of the package, and runs the tests on it.

python tests/plant_faults.py            # every fault, some minutes
python tests/plant_faults.py --only 3   # one of them

Each must be caught: some test must fail. A fault that no test notices is printed, and the script
ends with 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "transformer_lens_taskvec"


@dataclass(frozen=True)
class Fault:
    """A line as it is and as it would be wrong, and the tests that should notice."""

    file: str
    right: str
    wrong: str
    tests: str


ENGINE = "tests/test_engine_properties.py tests/test_evaluate.py"
EDITS = "tests/test_interventions.py tests/test_properties.py"
TD = "tests/test_decodability.py"
LEARNED = "tests/test_learned.py"
CARRIED = "tests/test_carried_hooks.py"
LENGTHS = "tests/test_lengths.py tests/test_architectures.py"
HOOK_POINTS = "tests/test_hook_points.py"
STATISTICS = "tests/test_statistics.py tests/test_comparison.py"
QUERIES = "tests/test_evaluate.py"
PROMPTS = "tests/test_prompts.py"
FAULTS = [
    Fault(
        "interventions/branches.py",
        "(index * length, hook)",
        "((index + 1) * length % 2, hook)",
        ENGINE,
    ),
    Fault(
        "interventions/variants.py",
        "1 + bisect_right(some, layer)",
        "1 + bisect_right(some, layer - 1)",
        ENGINE,
    ),
    Fault(
        "interventions/variants.py",
        "layer=hook.layer + 1, hook=",
        "layer=hook.layer, hook=",
        ENGINE,
    ),
    Fault("interventions/variants.py", "return [*moved, *rest]", "return [*rest, *moved]", ENGINE),
    Fault(
        "interventions/packed.py",
        "ids[:, :-1]], dim=1)\n        columns",
        "ids[:, 1:]], dim=1)\n        columns",
        ENGINE,
    ),
    Fault("interventions/packed.py", "values[:, 1:], ids", "values[:, :-1], ids", ENGINE),
    Fault(
        "models/forward.py", "dtype=torch.bool, device=device).tril()", "dtype=torch.bool)", ENGINE
    ),
    Fault(
        "models/forward.py",
        "prefix_mask.sum(dim=1, keepdim=True) + steps",
        "prefix_mask.shape[1] + steps",
        ENGINE,
    ),
    Fault(
        "models/past.py",
        "return values[index]",
        "return values[index * 0]",
        ENGINE,
    ),
    Fault("models/prefixes.py", "nodes[place].end :]", "nodes[place].start :]", ENGINE),
    Fault("models/prefixes.py", "min(common[start + 1 : end])", "common[start + 1]", ENGINE),
    Fault("models/forward.py", "+ real.cumsum(dim=1) - 1", "+ real.cumsum(dim=1)", ENGINE),
    Fault("models/readout.py", "if self.cap is None else", "if True else", "tests/test_models.py"),
    Fault("interventions/modes.py", "rows + vector.to(rows)", "rows + 2 * vector.to(rows)", EDITS),
    Fault(
        "interventions/intervention.py",
        "edited[rows, at] = self.edit(",
        "edited[:, -1:][rows, 0] = self.edit(",
        EDITS,
    ),
    Fault(
        "interventions/intervention.py", "edited = activation.clone()", "edited = activation", EDITS
    ),
    Fault("interventions/modes.py", "einsum(along, unit,", "2 * einsum(along, unit,", EDITS),
    Fault(
        "models/tokens.py",
        "else width - length + one",
        "else one",
        f"tests/test_evaluate.py tests/test_generate.py {PACKAGE}/models/tokens.py",
    ),
    Fault(
        "_utils/metrics.py",
        "answered.right_by_token.all(dim=-1)",
        "answered.right_by_token.any(dim=-1)",
        "tests/test_evaluate.py",
    ),
    Fault(
        "_utils/metrics.py",
        "nll.masked_fill(self.past, 0.0)",
        "nll.masked_fill(self.past, 1.0)",
        "tests/test_evaluate.py",
    ),
    Fault("analysis/classifiers.py", ".diagonal(start).fill_(torch.inf)", "", TD),
    Fault("analysis/classifiers.py", "1 - nearest / (2 *", "1 + nearest / (2 *", TD),
    Fault(
        "analysis/classifiers.py",
        "(counts / (counts - 1))[labels]",
        "(counts / counts)[labels]",
        TD,
    ),
    Fault(
        "analysis/decodability.py",
        "matrix[second, first] = hits[pair == 1]",
        "matrix[second, first] = hits[pair == 0]",
        TD,
    ),
    Fault(
        "analysis/permuted.py",
        "return (1 + as_high)",
        "return as_high",
        TD,
    ),
    Fault("_utils/statistics.py", ".cummax(dim=0).values", "", STATISTICS),
    Fault("_utils/statistics.py", "/ at.bincount()", "/ at.bincount().float().mean()", STATISTICS),
    Fault(
        "_utils/statistics.py",
        "torch.tensor((1 + confidence) / 2",
        "torch.tensor((confidence)",
        STATISTICS,
    ),
    Fault("_utils/statistics.py", "8 * n * lost * delta", "8 * n * gained * delta", STATISTICS),
    Fault("_utils/statistics.py", "n = own.shape[-1]\n    if", "n = len(queries)\n    if", QUERIES),
    Fault("_utils/scores.py", "self.demo_sets, confidence", "None, confidence", QUERIES),
    Fault("_utils/statistics.py", "clamp(1, n)", "clamp(1, 1)", STATISTICS),
    Fault(
        "_utils/statistics.py", "(rare * estimated + alike)", "(rare * estimated + 1)", STATISTICS
    ),
    Fault("prompts/sampling.py", "if demos not in found", "", PROMPTS),
    Fault("prompts/sampling.py", "(index + index // whole)", "index", PROMPTS),
    Fault("prompts/episodes.py", "demos=(), demo_set=None", "demos=()", PROMPTS),
    Fault("analysis/classifiers.py", "own == groups", "own < groups", TD),
    Fault("analysis/comparison.py", "_sign_test(means_by_query(apart, sets))", "0.0", STATISTICS),
    Fault(
        "interventions/variants.py",
        "(*prompts[row],), episodes[row].answer,",
        "(*prompts[row],),",
        QUERIES,
    ),
    Fault(
        "interventions/variants.py",
        "isinstance(hook, Intervention) and isinstance(hook.mode, str)",
        "True",
        QUERIES,
    ),
    Fault(
        "analysis/comparison.py", "torch.equal(other.queries, scores.queries)", "True", STATISTICS
    ),
    Fault(
        "_utils/statistics.py",
        "by_half[1, best[0]] + by_half[0, best[1]]",
        "by_half[0, best[0]] + by_half[1, best[1]]",
        STATISTICS,
    ),
    Fault(
        "analysis/comparison.py",
        "binomtest(better, better + worse)",
        "binomtest(better, len(own))",
        STATISTICS,
    ),
    Fault(
        "vectors/means.py",
        "activations.labels == index]",
        "activations.labels >= index]",
        "tests/test_vectors.py",
    ),
    Fault(
        "controls.py", "values.roll(1, dims=0)", "values.roll(0, dims=0)", "tests/test_controls.py"
    ),
    Fault(
        "analysis/perturbation.py",
        " - before.metrics[name].double()",
        "",
        "tests/test_analyses.py",
    ),
    Fault("interventions/packed.py", "- 1 > can.apart)", "- 1 > 3 * can.apart)", LENGTHS),
    Fault("models/limits.py", "yield name, size, kind is None", "yield name, size, False", LENGTHS),
    Fault(
        "interventions/branches.py",
        "edits.setdefault(id(points[hook.name])",
        "edits.setdefault(hook.name",
        "tests/test_evaluate.py",
    ),
    Fault("interventions/packed.py", "if can.hooked else [width", "if False else [width", CARRIED),
    Fault("models/carried.py", "in sorted(found)]", "in sorted(found)[::-1]]", CARRIED),
    Fault(
        "models/protocol.py", "with lock, _evaluating(model):", "with _evaluating(model):", CARRIED
    ),
    Fault("models/layouts.py", "if first != set(_TRIALS) or", "if", HOOK_POINTS),
    Fault("interventions/checks.py", "if head >= shape[0]:", "if head > shape[0]:", HOOK_POINTS),
    Fault(
        "interventions/packed.py",
        "if bool(values[..., 0].isnan().any()):",
        "if False:",
        HOOK_POINTS,
    ),
    Fault(
        "interventions/intervention.py",
        "= self.vector.clone()",
        "= self.vector",
        "tests/test_interventions.py",
    ),
    Fault(
        "vectors/outputs.py",
        "factors[place]\n        * einsum(",
        "einsum(",
        "tests/test_heads.py",
    ),
    Fault("interventions/gradients.py", "-(logp * self.real)", "-logp", LEARNED),
    Fault(
        "interventions/gradients.py",
        "losses[len(alone) :]",
        "losses[: len(branches.edited)]",
        LEARNED,
    ),
    Fault(
        "interventions/variants.py",
        "own[one.index] for own in places",
        "places[0][one.index] for _ in places",
        "tests/test_separators.py",
    ),
    Fault(
        "benchmark.py",
        "method.make(self.model, CONTROLS[kind](episodes, self.seed))",
        "method.make(self.model, episodes)",
        "tests/test_benchmark.py",
    ),
]


def caught(fault: Fault, folder: Path) -> str:
    """The line of the first failing test, or nothing."""
    for name in (PACKAGE, "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    file = folder / PACKAGE / fault.file
    text = file.read_text()
    if text.count(fault.right) != 1:
        raise SystemExit(
            f"{fault.file} has {fault.right!r} {text.count(fault.right)} times, not once"
        )
    file.write_text(text.replace(fault.right, fault.wrong))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *fault.tests.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"},
    )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if done.returncode == 1 and failed else ""


def main() -> int:
    """Plant each fault; 0 if every one is caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, help="the number of one fault")
    only = parser.parse_args().only
    missed = 0
    for number, fault in enumerate(FAULTS):
        if only not in (None, number):
            continue
        with tempfile.TemporaryDirectory() as folder:
            line = caught(fault, Path(folder))
        missed += not line
        what = f"{fault.file}: {fault.right!r} -> {fault.wrong!r}"
        print(f"{number:2} {'caught' if line else 'MISSED'}  {what}\n   {line}", flush=True)
    print(f"{missed} missed")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
