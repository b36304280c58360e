"""Plans against what then happens: time, and the memory of a process.

pytest tests/benchmarks/test_plan.py -s
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import record

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.models import counted

TESTS = Path(__file__).parents[1]
_MODELS = f"""
    import sys
    sys.path.insert(0, {str(TESTS)!r})
    import transformer_lens_taskvec as tv
    def made(name):
        if name != "wide":
            return tv.load_model(name, device="cpu")
        import zoo
        tokenizer = tv.load_hf_model("smollm2")[1]
        return zoo.bridge("llama", tokenizer, vocab_size=262_144)
    def job(name, work, each):
        model = made(name)
        names = ["singular_plural", "upper_case", "en_fr"]
        tasks = tv.bitwise_tasks(null=False) if name == "toy" else tv.find_tasks(names)
        sets = tv.sample_splits(tasks, {{"train": 4, "test": each}}, n_shots=5, seed=0)
        vectors = tv.task_vectors(tv.collect(model, sets["train"]))
        def variants(task):
            sweep = [vectors.inject(task, layer) for layer in vectors.layers]
            return [[], *(sweep if work == "sweep" else ())]
        return model, sets["test"], variants
"""
space: dict[str, Any] = {}
exec(textwrap.dedent(_MODELS), space)


@pytest.mark.parametrize("name", ["smollm2", "toy", "wide"])
@pytest.mark.parametrize("work", ["accuracy", "sweep"])
def test_the_time_planned_is_the_time_taken(
    name: str, work: str, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.get_num_threads() == 1:
        # On shared cores a process's own time is what can be compared.
        monkeypatch.setattr(counted, "clock", time.process_time)
    arguments = space["job"](name, work, 8 if name == "smollm2" else 40)
    tv.evaluate_many(*arguments)
    planned, taken = [], []
    for _ in range(3):
        planned.append(tv.plan(*arguments).seconds)
        started = counted.clock()
        tv.evaluate_many(*arguments)
        taken.append(counted.clock() - started)
    ratio = statistics.median(planned) / statistics.median(taken)
    record(f"{work} on {name}: seconds planned", "taken", 0.85, ratio, taken=min(taken))
    benchmark.pedantic(lambda: None, rounds=1)
    assert 0.85 <= ratio <= 1.15


_WATCHED = """
    import json, threading, time, psutil
    model, episodes, variants = job(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    planned = tv.plan(model, episodes, variants, tokens_per_second=1).peak_memory
    tv.evaluate_many(model, episodes[:1], variants)
    process, peak, done = psutil.Process(), 0, False
    start = process.memory_info().rss
    def watch():
        global peak
        while not done:
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    tv.evaluate_many(model, episodes, variants)
    done = True
    thread.join()
    print(json.dumps([planned, peak - start]))
"""


@pytest.mark.parametrize("name", ["smollm2", "wide"])
@pytest.mark.parametrize("work", ["accuracy", "sweep"])
def test_the_memory_planned_is_the_memory_taken(name: str, work: str, benchmark: Any) -> None:
    script = textwrap.dedent(_MODELS) + textwrap.dedent(_WATCHED)
    found = {}
    # An allocator that gives back at once what is freed shows how much is in use.
    for allocator, setting in {"exact": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "usual": {}}.items():
        out = subprocess.run(
            [sys.executable, "-c", script, name, work, "24"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **setting},
        ).stdout.splitlines()
        found[allocator] = planned, taken = json.loads(out[-1])
        print(
            f"\n{work} on {name}, {allocator} allocator: planned {planned / 2**20:.0f} MB, "
            f"taken {taken / 2**20:.0f} MB"
        )
    planned, taken = found["exact"]
    record(f"{work} on {name}: memory planned", "taken", 0.85, planned / taken)
    benchmark.pedantic(lambda: None, rounds=1)
    assert 0.85 <= planned / taken <= 1.15
