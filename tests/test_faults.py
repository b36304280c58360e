"""Damaged and hostile files, full disks, two processes at once, kills.

``pytest tests/test_faults.py`` reads some 1,500 damaged files; with ``-m slow`` 8,800 others.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kill_studies
import matplotlib.pyplot as plt
import pytest
import torch

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import _smollm as smollm
from transformer_lens_taskvec._utils.atomic_io import replacing, write_text
from transformer_lens_taskvec._utils.training_state import TrainingState
from transformer_lens_taskvec.activations import Source
from transformer_lens_taskvec.lab.presets import PRESETS, train
from transformer_lens_taskvec.lab.problems.sparse_linear import SparseLinearMixture
from transformer_lens_taskvec.lab.toy import model as toy
from transformer_lens_taskvec.lab.training import loop as train_module
from transformer_lens_taskvec.lab.training.config_file import load_config
from transformer_lens_taskvec.lab.training.runs import load_run
from transformer_lens_taskvec.lab.training.stopping import EarlyStopping
from transformer_lens_taskvec.paper.checkpoints import over_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = dataclasses.replace(
    PRESETS["small"],
    problem=SparseLinearMixture.orthogonal(2, 2, n_points=4),
    n_layers=1,
    n_heads=2,
    d_model=8,
    steps=6,
    batch_size=4,
    warmup=1,
    n_checkpoints=2,
    n_eval=4,
)


def vectors() -> tv.TaskVectors:
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    source = Source("toy", "resid_post", -1, "example:{x}->{y}", False)
    return tv.TaskVectors(values, ("AND", "OR"), (0, 1, 2), source)


# --- damaged and hostile files ---

HOSTILE_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 10**9, 10**19, 10**400, 1e308, float("nan"), float("inf")),
    *("", "x", "\ud800", "../../x", "/dev/zero", "\x00", "9" * 50, "x" * 5_000),
    *([], {}, [[]], [None], {"x": 1}, ["a", 1], [[1], [2, 3]], [float("inf")], [10**30]),
)
HOSTILE_BYTES = (
    *(b"", b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\t", b"\n\n"),
    *(b"[" * 100_000, b"(" * 1_000, b"{", b"}", b")", b'"', b"\\ud800", b"1e999", b"NaN", b"-"),
    *(b"9" * 5_000, b"a" * 1_100_000, "\u2028\x85".encode(), b"null", b"1-999999999", b"#", b"_"),
)
HEADER_LENGTHS = (0, 1, 7, 2**20, 100_000_001, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Truncated, with flipped bits, or with a piece cut out, doubled, overwritten or put in."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice([1, 1, 4, 30, 300]))
    kind = rng.randrange(7)
    if kind == 0:
        return data[:start]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return data[:start] + data[end:]
    if kind == 3:
        return data[:end] + data[start:]
    if kind == 4:
        return data[:start] + rng.randbytes(end - start) + data[end:]
    if kind == 5:
        lines = data.splitlines(keepends=True)
        rng.shuffle(lines)
        return b"".join(lines[: rng.randrange(len(lines) + 1)])
    return data[:start] + rng.choice(HOSTILE_BYTES) + data[end if rng.random() < 0.5 else start :]


def damaged_value(value: Any, rng: random.Random) -> Any:
    """A JSON value in which one part, at any depth, is gone, doubled, renamed or hostile."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        copy: Any = value.copy()
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        kind = rng.random()
        if kind < 0.15:
            del copy[key]
        elif kind < 0.25 and isinstance(copy, list):
            copy.append(copy[key])
        elif kind < 0.25:
            copy[rng.choice(["", "x", "checkpoint", "families"])] = copy.pop(key)
        else:
            copy[key] = damaged_value(copy[key], rng)
        return copy
    if isinstance(value, str) and value[:1] in ("[", "{", '"') and rng.random() < 0.8:
        return dumped(damaged_value(json.loads(value), rng))  # JSON in the metadata of tensors
    return rng.choice(HOSTILE_VALUES)


def dumped(value: Any) -> str:
    """JSON, with numbers of more digits than Python writes."""
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value)
    finally:
        sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return damaged_bytes(data, rng)
    return dumped(damaged_value(json.loads(data), rng)).encode()


def damaged_lines(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return damaged_bytes(data, rng)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = damaged_json(lines[at], rng)
    return b"\n".join(lines)


def damaged_tensors(data: bytes, rng: random.Random) -> bytes:
    """Besides bytes: a header that lies about its length, or about what the tensors are."""
    kind = rng.random()
    if kind < 0.4:
        return damaged_bytes(data, rng)
    if kind < 0.5:
        return struct.pack("<Q", rng.choice(HEADER_LENGTHS)) + data[8:]
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = rng.choice(list(header))
    entry = header[name]
    if kind < 0.65 and "dtype" in entry:
        dtypes = ["F64", "F16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "X"]
        entry["dtype"] = rng.choice(dtypes)
        shapes = [[2**40, 2**30], [0, 2**60], [2**63], [1], [], [-1], [data_size(entry)]]
        if rng.random() < 0.5:
            entry["shape"] = rng.choice(shapes)
        if rng.random() < 0.3:
            entry["data_offsets"] = rng.choice([[0, 2**63], [2**40, 2**41], [5, 1], [0, 0]])
    else:
        header[name] = damaged_value(entry, rng)
    text = dumped(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def data_size(entry: Mapping[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return int(end) - int(start)


Damage = Callable[[bytes, random.Random], bytes]


@dataclasses.dataclass(frozen=True)
class Loader:
    """A function that reads files, whole files for it, and how each is damaged.

    ``place`` is what the messages of its errors say besides the path.
    """

    name: str
    make: Callable[[Path], Any]
    load: Callable[[Path], Any]
    damage: Mapping[str, Damage]
    place: str = ""


def make_vectors(folder: Path) -> None:
    vectors().save(folder / "v.safetensors")


def make_run(folder: Path) -> None:
    train(CONFIG, folder, seed=1, progress=False, device="cpu")


def read_run(folder: Path) -> None:
    run = load_run(folder)
    repr(run)
    if run.steps:
        run.model()


def make_toy_run(folder: Path) -> None:
    shipped = toy.shipped_toy_run().path
    (folder / "checkpoints").mkdir()
    for name in ("config.json", "metrics.jsonl", "checkpoints/step_001500.safetensors"):
        shutil.copy(shipped / name, folder / name)


def read_toy_run(folder: Path) -> None:
    run = load_run(folder)
    if run.steps:
        repr(run)
        run.model()


def make_results(folder: Path) -> None:
    rows = [
        {"task": task, "shots": 4, "layer": 1, "td": 0.5, "accuracy": 1.0} for task in ("AND", "OR")
    ]
    (folder / "toy@1.json").write_text(json.dumps({"model": "toy", "results": rows}))


def read_results(folder: Path) -> None:
    def never(checkpoint: Any) -> Any:
        raise AssertionError("there is a saved result")

    repr(over_checkpoints("toy", [1], never, load=never, folder=folder))


def make_mappings(folder: Path) -> None:
    pairs = {"sky": "blue", "grass": "green", "Señor": "東京"}
    (folder / "m.json").write_text(json.dumps(pairs, ensure_ascii=False, indent=0), "utf-8")


def make_lists(folder: Path) -> None:
    pairs = [{"input": "sky", "output": "blue"}, {"input": "grass", "output": "green", "n": 1}]
    (folder / "m.json").write_text(json.dumps(pairs, indent=0))


CONLLU = """# text = She didn't sing
1\tShe\tshe\tPRON\t_\t_\t4\tnsubj\t_\t_
2-3\tdidn't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdid\tdo\tAUX\t_\t_\t4\taux\t_\t_
3\tn't\tnot\tPART\t_\t_\t4\tadvmod\t_\t_
3.1\tever\tever\tADV\t_\t_\t_\t_\t_\t_
4\tsing\tsing\tVERB\t_\t_\t0\troot\t_\tSpaceAfter=No

1\tRain\train\tNOUN\t_\t_\t0\troot\t_\t_
"""
TREES = """( (S (NP (PRP She) ) (VP (VBZ sings) (NP (-NONE- *) )) (. .) ))
( (S (NP (-LRB- -LRB-) (NN rain|NNS) (JJ|NN cold) )
  (VP (VBD 1\\/2) )))
"""


def make_treebank(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.mrg").write_text(TREES)


def make_cache(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "config.json").write_text("{}")
    names = ("model.safetensors", "config.json")
    manifest = {"format": 2, "crc32": {name: smollm._crc32(folder / name) for name in names}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def adapter() -> tuple[dict[str, torch.Tensor], Any]:
    trained = {name: torch.ones(3, 2, requires_grad=True) for name in ("A", "B")}
    return trained, torch.optim.AdamW(trained.values())


def make_adapter(folder: Path) -> None:
    trained, optimizer = adapter()
    sum(value.sum() for value in trained.values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    TrainingState(folder / "adapter.safetensors", trained, [optimizer], training="r").save(7)


def read_adapter(folder: Path) -> None:
    trained, optimizer = adapter()
    TrainingState(folder / "adapter.safetensors", trained, [optimizer], training="r").load()


def read_state(folder: Path) -> None:
    state = train_module._State.start(CONFIG, 1, torch.device("cpu"))
    state.saved_in(folder).load()


RUN = {"config.json": damaged_json, "metrics.jsonl": damaged_lines}
LINES = r", line \d+: |has no (sentences|\.mrg files)"
LOADERS = [
    Loader(
        "TaskVectors.load",
        make_vectors,
        lambda folder: repr(tv.TaskVectors.load(folder / "v.safetensors")),
        {"v.safetensors": damaged_tensors},
    ),
    Loader(
        "load_run",
        make_run,
        read_run,
        {**RUN, "checkpoints/step_000006.safetensors": damaged_tensors},
        r"config\.json: |metrics\.jsonl(, line \d+)?: |\.safetensors: |toy model|no checkpoint",
    ),
    Loader(
        "load_config",
        lambda folder: train(CONFIG, folder, progress=False, device="cpu", stop=EarlyStopping(3)),
        lambda folder: load_config(folder / "config.json"),
        {"config.json": damaged_json},
        r"config\.json: ",
    ),
    Loader("over_checkpoints", make_results, read_results, {"toy@1.json": damaged_json}),
    Loader(
        "load_mapping of an object",
        make_mappings,
        lambda folder: tv.load_mapping(folder / "m.json"),
        {"m.json": damaged_json},
        r", line \d+: |, entry \d+ |no pairs|expected|too long",
    ),
    Loader(
        "load_mapping of a list",
        make_lists,
        lambda folder: tv.load_mapping(folder / "m.json"),
        {"m.json": damaged_json},
        r", line \d+: |, entry \d+ |no pairs|expected|too long",
    ),
    Loader(
        "load_conllu",
        lambda folder: (folder / "s.conllu").write_text(CONLLU),
        lambda folder: tv.tasks.load_conllu(folder / "s.conllu"),
        {"s.conllu": damaged_bytes},
        LINES,
    ),
    Loader("load_treebank", make_treebank, tv.tasks.load_treebank, {"b.mrg": damaged_bytes}, LINES),
    Loader("SmolLM2's cache", make_cache, smollm._is_intact, {"manifest.json": damaged_json}),
    Loader(
        "load_run of the toy",
        make_toy_run,
        read_toy_run,
        {**RUN, "checkpoints/step_001500.safetensors": damaged_tensors},
    ),
    Loader("an adapter", make_adapter, read_adapter, {"adapter.safetensors": damaged_tensors}),
    Loader("a training's state", make_run, read_state, {"state.safetensors": damaged_tensors}),
]


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """All files with their sizes and times."""
    found = ((path, path.stat()) for path in folder.rglob("*"))
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found}


@contextmanager
def little_memory(size: int = 2**30) -> Iterator[None]:
    """Let the process take so many bytes more than it has, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def complaint(loader: Loader, folder: Path) -> str | None:
    """What is wrong with the way in which the loader takes the files in a folder."""
    try:
        loader.load(folder)
    except (ValueError, OSError) as error:
        message = str(error)
        if str(folder) not in message:
            return f"no file name in {type(error).__name__}: {message[:300]}"
        if not re.search(loader.place, message):
            return f"no place in {type(error).__name__}: {message[:300]}"
        if len(message) > 1_000 or "\n" in message or "allocate" in message:
            return f"unreadable, or out of memory: {message[:300]}"
        message.encode()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def complaints(loader: Loader, folder: Path, seeds: range) -> list[str]:
    """Damage the files one at a time, once for each seed; what is wrong with the outcomes."""
    loader.make(folder)
    whole = {name: (folder / name).read_bytes() for name in loader.damage}
    assert complaint(loader, folder) is None
    found = []
    for seed in seeds:
        rng = random.Random(f"{loader.name} {seed}")
        name = rng.choice(list(whole))
        (folder / name).write_bytes(loader.damage[name](whole[name], rng))
        before = state_of(folder)
        problem = complaint(loader, folder)
        if state_of(folder) != before:
            problem = f"files were changed; {problem}"
        if problem is not None:
            found.append(f"{loader.name}, {name}, seed {seed}: {problem}")
        (folder / name).write_bytes(whole[name])
    return found


def check(loader: Loader, folder: Path, monkeypatch: pytest.MonkeyPatch, seeds: range) -> None:
    monkeypatch.setattr(toy, "bridge_from_hf", lambda *args, **kwargs: None)
    started = time.perf_counter()
    with little_memory():
        found = complaints(loader, folder, seeds)
    assert not found, f"{len(found)} of {len(seeds)}:\n" + "\n".join(found[:20])
    assert time.perf_counter() - started < 5 + 0.1 * len(seeds)


EVERY = [pytest.param(loader, id=loader.name) for loader in LOADERS]


@pytest.mark.parametrize("loader", EVERY)
def test_damaged_files_are_loaded_or_refused_by_name(
    loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(loader, tmp_path, monkeypatch, range(140))


@pytest.mark.slow
@pytest.mark.parametrize("loader", EVERY)
def test_many_damaged_files_are_loaded_or_refused_by_name(
    loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(loader, tmp_path, monkeypatch, range(140, 940))


def test_the_place_of_the_damage_is_named(tmp_path: Path) -> None:
    make_run(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole.replace('"step": 6', '"stop": 6'))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3: not an evaluation: no key 's"):
        load_run(tmp_path)
    metrics.write_text(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    for settings, message in (
        ({**config, "n_heads": 10**9}, r"config\.json: .*d_model must be a multiple of n_heads"),
        ({**config, "d_model": 10**9}, r"000006\.safetensors: .*too few for the model that conf"),
        ({**config, "n_layers": 10**9}, r"000006\.safetensors: .*too few for the model"),
        ({**config, "steps": 0}, r"config\.json: .*steps must be at least 1, got 0"),
        ({**config, "problem": {"kind": "Mine"}}, r"config\.json: .*run's problem as problem="),
        ([config], r"config\.json: damaged settings of a run: expected an object"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=message), little_memory():
            load_run(tmp_path).model()


def test_a_run_without_an_evaluation_yet_says_so(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    run = load_run(tmp_path)
    assert "no checkpoint yet" in repr(run)
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        run.model()


@pytest.mark.parametrize(
    "loader",
    [param for param in EVERY if param.id not in ("SmolLM2's cache", "load_run of the toy")],
)
def test_a_folder_in_the_place_of_a_file_is_refused_by_name(loader: Loader, tmp_path: Path) -> None:
    loader.make(tmp_path)
    (first, *_) = loader.damage
    (tmp_path / first).unlink()
    (tmp_path / first).mkdir()
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        loader.load(tmp_path)


@pytest.mark.parametrize("name", ["/dev/zero", "../outside", "", "."])
def test_the_cache_reads_no_file_outside_of_it(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make_cache(folder)
    (tmp_path / "outside").write_bytes(b"")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["crc32"][name] = 0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert not smollm._is_intact(folder)


def test_a_cache_without_weights_or_with_endless_brackets_is_damaged(tmp_path: Path) -> None:
    for text in ('{"format": 2, "crc32": {}}', "[" * 100_000):
        (tmp_path / "manifest.json").write_text(text)
        assert not smollm._is_intact(tmp_path)


# --- disks that are full, folders that cannot be written to ---


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes: the system's own write errors, without a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def experiment() -> tv.Experiment:
    tasks = {name: task for name, task in tv.bitwise_tasks().items() if name in ("AND", "OR")}
    return tv.run_experiment(tv.load_model("toy", device="cpu"), tasks, n_shots=2, n=6)


@pytest.fixture(scope="module")
def study() -> tv.paper.ShotStudy:
    model = tv.load_model("toy", device="cpu")
    return tv.paper.run_study(model, tv.bitwise_tasks(), shots=(1, 2), steer_shots=(1,), n=3, k=3)


@dataclasses.dataclass(frozen=True)
class Writer:
    """A function that writes a file or a folder, and a size of files that stops it."""

    name: str
    write: Callable[[Any, Path], Any]
    stops_at: int


WRITERS = [
    Writer("experiment", lambda result, out: result.save(out), 1_000),
    Writer("study", lambda result, out: result.save(out), 1_000),
    Writer("study", lambda result, out: result.save(out), 50_000),
    Writer("vectors", lambda result, out: result.save(out / "v.safetensors"), 100),
    Writer("run", lambda _, out: train(CONFIG, out, seed=1, progress=False, device="cpu"), 100),
    Writer("run", lambda _, out: train(CONFIG, out, seed=1, progress=False, device="cpu"), 3_000),
]
EVERY_WRITER = [pytest.param(writer, id=f"{writer.name}-{writer.stops_at}") for writer in WRITERS]


def result_of(name: str, request: pytest.FixtureRequest) -> Any:
    if name == "run":
        return None
    return vectors() if name == "vectors" else request.getfixturevalue(name)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("writer", EVERY_WRITER)
def test_a_full_disk_leaves_old_files_whole_and_nothing_else(
    writer: Writer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    result = result_of(writer.name, request)
    place = str(tmp_path)
    with full_disk(writer.stops_at), pytest.raises(OSError, match=f"large.*{place}|{place}.*large"):
        writer.write(result, tmp_path)
    first = contents(tmp_path)
    assert not [name for name in first if name.endswith(".tmp") or "/." in f"/{name}"]
    writer.write(result, tmp_path)
    whole = contents(tmp_path)
    assert {name: whole[name] for name in first} == first
    if writer.name == "run":  # nothing more to write
        return
    with full_disk(writer.stops_at), pytest.raises(OSError):
        writer.write(result, tmp_path)
    assert contents(tmp_path) == whole
    assert not plt.get_fignums()


@pytest.mark.parametrize("name", ["experiment", "study", "vectors", "run"])
def test_no_space_left_is_said_with_the_file(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of the last step, which moves the file to its place."""
    result = result_of(name, request)
    writer = next(writer for writer in WRITERS if writer.name == name)

    def full(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*\.[a-z]+'") as raised:
        writer.write(result, tmp_path)
    assert raised.value.errno == errno.ENOSPC
    assert not [path for path in contents(tmp_path) if not path.endswith(".png")]


@pytest.mark.parametrize("name", ["experiment", "study", "vectors", "run"])
def test_a_folder_that_cannot_be_written_to_is_named(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    result = result_of(name, request)
    writer = next(writer for writer in WRITERS if writer.name == name)
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        with pytest.raises(OSError, match=re.escape(str(file))):
            writer.write(result, out)
    assert contents(tmp_path) == {"file": b"mine"}


def test_training_goes_on_to_the_same_bits_after_a_full_disk(tmp_path: Path) -> None:
    make_run(tmp_path / "straight")
    for size in (100, 600, 3_000, 5_000, 9_000):
        with full_disk(size), pytest.raises(OSError):
            make_run(tmp_path / "run")
    make_run(tmp_path / "run")
    one, other = (contents(tmp_path / name) for name in ("straight", "run"))
    assert one.keys() == other.keys()
    for name in one:
        if name.endswith(".safetensors"):
            assert kill_studies.same(tmp_path / "straight" / name, tmp_path / "run" / name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
@pytest.mark.parametrize("size", ["64k", "128k", "256k"])
def test_a_disk_that_is_full_is_a_message_of_the_command(size: str, tmp_path: Path) -> None:
    script = (
        f"mount -t tmpfs -o size={size} tmpfs {tmp_path} || exit 77\n"
        f"{sys.executable} -m transformer_lens_taskvec "
        f"{kill_studies.COMMANDS['run']} --out {tmp_path}/out; code=$?\n"
        f"ls -A {tmp_path}/out; exit $code"
    )
    outcome = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True
    )
    if outcome.returncode == 77 or "unshare:" in outcome.stderr:
        pytest.skip("needs a file system of one's own")
    if size == "256k":
        assert outcome.returncode == 0, outcome.stderr
        return
    assert outcome.returncode == 2, outcome.stderr
    assert "No space left on device" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout.splitlines()[-1].startswith("task decodability")  # no file left


# --- two processes at once ---


def in_processes(n: int, function: Callable[..., Any], *args: Any) -> list[int]:
    """Run a function in some forks at once; their exit codes."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(n)

    def body(number: int) -> None:
        barrier.wait()
        function(number, *args)

    processes = [context.Process(target=body, args=(number,)) for number in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode or 0 for process in processes]


def fill(number: int) -> None:
    """What a process does that wants the model: it must find it whole from then on."""
    folder = smollm.packaged_folder("smollm2")
    for _ in range(100):
        if not smollm._is_intact(folder):
            raise SystemExit(3)


def stand_in(folder: Path, model: Any, tokenizer: Any) -> None:
    """Small files in the place of the model; making it takes longer than finding it damaged."""
    time.sleep(0.1)
    folder.mkdir()
    make_cache(folder)


@pytest.mark.parametrize("before", ["nothing", "a damaged cache"])
def test_processes_that_fill_the_cache_at_once_all_find_it_whole(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm, "read_gguf", lambda path, **kwargs: (None, None))
    monkeypatch.setattr(smollm, "_write", stand_in)
    for attempt in range(8):
        root = tmp_path / str(attempt)
        monkeypatch.setenv(smollm.CACHE_VARIABLE, str(root))
        folder = root / "smollm2-135m-instruct"
        if before != "nothing":
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(b"half")
        assert in_processes(4, fill) == [0] * 4
        assert [path.name for path in root.iterdir()] == [folder.name]


def write_often(number: int, path: Path) -> None:
    from transformer_lens_taskvec._utils.atomic_io import write_text

    for _ in range(50):
        write_text(path, str(number) * 20_000)
        text = path.read_text()
        if len(text) != 20_000 or len(set(text)) != 1:
            raise SystemExit(3)


def test_processes_that_write_a_file_at_once_never_mix_it(tmp_path: Path) -> None:
    assert in_processes(4, write_often, tmp_path / "results.json") == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.slow
def test_two_real_fills_of_the_cache_at_once(tmp_path: Path) -> None:
    code = (
        "from transformer_lens_taskvec import load_model, generate\n"
        "model = load_model('smollm2', device='cpu')\n"
        "assert generate(model, ['The capital of France is'], max_new_tokens=1) == [' Paris']\n"
    )
    environment = {**os.environ, smollm.CACHE_VARIABLE: str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (folder,) = tmp_path.iterdir()
    assert smollm._is_intact(folder)


# --- kills ---

SCRIPT = Path(kill_studies.__file__)


def kill(times: int, commands: str) -> str:
    command = [sys.executable, str(SCRIPT), "--times", str(times), "--commands", commands]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


def test_a_killed_command_runs_again_to_the_same_bytes() -> None:
    assert "2 kills" in kill(2, "run")


@pytest.mark.slow
def test_50_killed_commands_run_again_to_the_same_bytes() -> None:
    assert "50 kills" in kill(50, ",".join(kill_studies.COMMANDS))


def test_threads_that_write_one_file_do_not_mix(tmp_path: Path) -> None:
    path, found = tmp_path / "file", []

    def other() -> None:
        write_text(path, "other")
        found.append(path.read_text())

    with replacing(path) as temporary:
        temporary.write_text("half of one")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert found == ["other"]
        with temporary.open("a") as file:
            file.write(", and the rest")
    assert path.read_text() == "half of one, and the rest"
    assert [*tmp_path.iterdir()] == [path]
