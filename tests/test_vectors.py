from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import save_file

import transformer_lens_taskvec as tv


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
        "format": "taskvec-1",
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
