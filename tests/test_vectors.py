from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import save_file

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.models.protocol import fingerprint


@pytest.mark.model
def test_a_vector_is_the_mean_of_its_tasks_activations(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    found = tv.collect(model, episodes)
    for index, task in enumerate(found.tasks):
        own = found.values[[label == index for label in found.labels.tolist()]]
        expected = own.double().sum(dim=0) / len(own)
        torch.testing.assert_close(vectors[task].double(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(vectors[task, 1], vectors[task][1])


def test_layers_are_found_by_their_number(model: Any, episodes: list[tv.Episode]) -> None:
    some = tv.task_vectors(tv.collect(model, episodes, layers=[2, 0]))
    whole = tv.task_vectors(tv.collect(model, episodes))
    torch.testing.assert_close(some["en_fr", 2], whole["en_fr", 2], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"layer 1 is not among the layers \[2, 0\]"):
        some["en_fr", 1]


def test_an_unknown_task_is_named_with_the_known_ones(vectors: tv.TaskVectors) -> None:
    with pytest.raises(KeyError, match="no vector for task 'AND'; there are: singular_plural"):
        vectors["AND"]


def test_saving_and_loading_is_the_identity(
    model: Any, vectors: tv.TaskVectors, tmp_path: Path
) -> None:
    path = tmp_path / "vectors.safetensors"
    vectors.save(path)
    loaded = tv.TaskVectors.load(path, model)
    assert torch.equal(loaded.values, vectors.values)
    assert (loaded.tasks, loaded.layers) == (vectors.tasks, vectors.layers)
    assert loaded.source == vectors.source
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_loading_for_another_model_is_refused_with_both_names(
    vectors: tv.TaskVectors, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "vectors.safetensors"
    vectors.save(path)
    with pytest.raises(ValueError, match="come from 'tiny-llama', the model is 'tiny-gpt2'"):
        tv.TaskVectors.load(path, zoo.bridge("gpt2", tokenizer))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(
    vectors: tv.TaskVectors, tmp_path: Path, share: float
) -> None:
    path = tmp_path / "vectors.safetensors"
    vectors.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"vectors\.safetensors: damaged"):
        tv.TaskVectors.load(path)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("tasks", "[1"),
        ("tasks", '["a"]'),
        ("layers", '"x"'),
        ("source", "{}"),
        ("source", "[]"),
        ("format", "taskvec-0"),
    ],
)
def test_wrong_metadata_is_refused(
    vectors: tv.TaskVectors, tmp_path: Path, field: str, text: str
) -> None:
    path = tmp_path / "vectors.safetensors"
    metadata = {
        "format": "taskvec-3",
        "tasks": json.dumps(vectors.tasks),
        "layers": json.dumps(vectors.layers),
        "source": json.dumps(vectors.source.__dict__),
    }
    save_file({"values": vectors.values}, path, metadata={**metadata, field: text})
    with pytest.raises(ValueError, match=r"vectors\.safetensors: damaged"):
        tv.TaskVectors.load(path)


def test_a_missing_folder_leaves_nothing_behind(vectors: tv.TaskVectors, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        vectors.save(tmp_path / "nowhere" / "vectors.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_activations_with_nan_have_no_mean(model: Any, episodes: list[tv.Episode]) -> None:
    found = tv.collect(model, episodes)
    found.values[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        tv.task_vectors(found)


def test_saved_vectors_may_be_read_by_whoever_may_read_other_files(
    vectors: tv.TaskVectors, tmp_path: Path
) -> None:
    (tmp_path / "other").write_text("")
    vectors.save(tmp_path / "v.safetensors")
    assert (tmp_path / "v.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def finetuned(model: Any) -> Any:
    """A copy with one weight matrix changed a little."""
    other = copy.deepcopy(model)
    weight = next(p for name, p in other.named_parameters() if p.ndim > 1 and "embed" not in name)
    weight.data.mul_(1.0001)
    return other


@pytest.mark.model
def test_vectors_of_other_weights_under_the_same_name_are_warned_about(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors, tmp_path: Path
) -> None:
    assert vectors.source.weights == fingerprint(model) is not None
    other = finetuned(model)
    here, there = fingerprint(other), vectors.source.weights
    assert here != there
    message = f"other weights of .*fingerprint {there}.*fingerprint {here}.*finetuned copy"
    vectors.save(tmp_path / "v.safetensors")
    for use in (
        lambda m: tv.TaskVectors.load(tmp_path / "v.safetensors", m),
        lambda m: tv.layer_sweep(m, tv.zero_shot(episodes[:3]), vectors),
        lambda m: tv.perturbation_matrix(m, episodes[:3], vectors, 1),
    ):
        with pytest.warns(UserWarning, match=message):
            use(other)
    own = tv.task_vectors(tv.collect(other, episodes))
    unknown = dataclasses.replace(vectors, source=dataclasses.replace(vectors.source, weights=None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tv.layer_sweep(model, tv.zero_shot(episodes[:3]), vectors)
        tv.layer_sweep(other, tv.zero_shot(episodes[:3]), own)
        tv.layer_sweep(other, tv.zero_shot(episodes[:3]), unknown)
    assert not [one for one in caught if "other weights" in str(one.message)]


@pytest.mark.model
def test_the_fingerprint_is_of_every_parameter_and_of_nothing_else(model: Any) -> None:
    known = fingerprint(model)
    for name, _ in model.named_parameters():
        other = copy.deepcopy(model)
        dict(other.named_parameters())[name].data.add_(1e-3)
        assert fingerprint(other) != known, name
    assert fingerprint(copy.deepcopy(model)) == fingerprint(copy.deepcopy(model).double()) == known
    half = copy.deepcopy(model).bfloat16()
    assert fingerprint(half) == fingerprint(half.float()) != known
    assert fingerprint(object()) is None


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    code = (
        "import transformer_lens_taskvec as tv\n"
        "from transformer_lens_taskvec.models.protocol import fingerprint\n"
        "print(fingerprint(tv.load_model('toy', device='cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == fingerprint(tv.load_model("toy", device="cpu"))


def test_the_fingerprint_of_a_real_model_takes_milliseconds(smollm2: Any) -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        fingerprint(smollm2)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def test_the_revision_is_that_of_the_hub(model: Any, episodes: list[tv.Episode]) -> None:
    config = getattr(getattr(model, "original_model", model), "config", model.cfg)
    assert tv.collect(model, episodes[:2]).source.revision is None
    config._commit_hash = "abc"
    try:
        assert tv.collect(model, episodes[:2]).source.revision == "abc"
    finally:
        config._commit_hash = None


def test_a_file_says_how_its_vectors_were_made(model: Any, tmp_path: Path) -> None:
    tasks = tv.find_tasks(["singular_plural", "upper_case"])
    episodes = tv.sample_episodes(tasks, n=3, n_shots=2, seed=7)
    made = tv.task_vectors(tv.collect(model, [*episodes, *episodes[:1]]))
    made.save(tmp_path / "v.safetensors")
    source = tv.TaskVectors.load(tmp_path / "v.safetensors", model).source
    assert source == made.source
    assert (source.seed, source.n, source.n_shots) == (7, (3, 4), (2,))
    with safe_open(tmp_path / "v.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["version"] == tv.__version__
    assert json.loads(metadata["source"])["weights"] == fingerprint(model)
    again = tv.sample_episodes(tasks, n=3, n_shots=2, seed=8)
    assert tv.collect(model, [*episodes, *again]).source.seed is None
    by_hand = [dataclasses.replace(episode, seed=None) for episode in tv.zero_shot(episodes)]
    assert by_hand == tv.zero_shot(episodes)
    source = tv.collect(model, by_hand).source
    assert (source.seed, source.n_shots) == (None, (0,))


def test_a_file_without_a_fingerprint_is_refused(vectors: tv.TaskVectors, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    vectors.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), "format": "taskvec-2"}
    save_file({"values": vectors.values}, path, metadata=metadata)
    with pytest.raises(ValueError, match="'taskvec-2', not 'taskvec-3', which has the fingerprint"):
        tv.TaskVectors.load(path)
