"""Whatever can be injected is swept, controlled, compared: nothing asks what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.activations import Source
from transformer_lens_taskvec.vectors.base import Injectable

pytestmark = pytest.mark.filterwarnings("ignore:.*one intervention at a time")


@dataclass(frozen=True)
class TwoLayers:
    """A vector at two layers at once: the one choice of layer is None."""

    vectors: tv.TaskVectors
    at: tuple[int, int]

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.vectors.tasks

    @property
    def layers(self) -> Sequence[int | None]:
        return (None,)

    @property
    def source(self) -> Source:
        return self.vectors.source

    def inject(
        self,
        task: str,
        layer: int | None,
        *,
        mode: Any = None,
        scale: float = 1.0,
        position: Any = -1,
    ) -> list[tv.Intervention]:
        return [
            edit
            for one in self.at
            for edit in self.vectors.inject(
                task, one, mode=mode or "add", scale=scale, position=position
            )
        ]


@pytest.mark.model
def test_vectors_inject_themselves_where_they_come_from(
    model: Any, episodes: list[tv.Episode]
) -> None:
    vectors = tv.task_vectors(tv.collect(model, episodes, hook="resid_mid"))
    assert isinstance(vectors, Injectable)
    edits = vectors.inject("en_fr", 1, scale=2.0)
    assert edits == [tv.inject(vectors["en_fr", 1], 1, scale=2.0, hook="resid_mid")]
    added = vectors.inject("en_fr", 1, mode="add", position=None)
    assert added == [tv.inject(vectors["en_fr", 1], 1, mode="add", hook="resid_mid", position=None)]
    with pytest.raises(KeyError, match="no vector for task 'fr_en'"):
        vectors.inject("fr_en", 1)
    with pytest.raises(ValueError, match="layer 7 is not among"):
        vectors.inject("en_fr", 7)


@pytest.mark.model
def test_an_injectable_of_ones_own_goes_through_everything(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    own = TwoLayers(vectors, (0, 2))
    assert isinstance(own, Injectable)
    by_hand = tv.evaluate_many(
        model,
        episodes,
        lambda task: [[tv.inject(vectors[task, layer], layer, mode="add") for layer in (0, 2)]],
    )[0]
    sweep = tv.layer_sweep(model, episodes, own, controls=True)
    assert sweep.layers == (None,) and sweep.best_layer() is None
    torch.testing.assert_close(sweep.scores_at(None).loss, by_hand.loss, atol=1e-3, rtol=1e-4)
    matrix = tv.perturbation_matrix(model, episodes, own, None)
    row = matrix.sources.index("en_fr")
    change = by_hand.of("en_fr").mean_loss - sweep.baseline.of("en_fr").mean_loss
    assert float(matrix.delta_loss[row, row]) == pytest.approx(change, abs=1e-3)
    steering = tv.steering_effect(model, episodes, own, None, null="en_fr")
    torch.testing.assert_close(steering.positive.loss, by_hand.loss, atol=1e-3, rtol=1e-4)
    assert sweep.to_frame().layer.isna().all()


@pytest.mark.model
def test_controls_of_an_injectable_are_injected_as_it_is(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    own = TwoLayers(vectors, (0, 2))
    made = tv.control_vectors(own, model, episodes, kinds=["random", "other task", "mean"])
    edits = own.inject("en_fr", None)
    for kind, control in made.items():
        others = control.inject("en_fr", None)
        assert [(e.layer, e.mode, e.hook) for e in others] == [
            (e.layer, e.mode, e.hook) for e in edits
        ], kind
    pairs = zip(made["random"].inject("en_fr", None), edits, strict=True)
    for random, edit in pairs:
        assert float(random.vector.norm()) == pytest.approx(float(edit.vector.norm()), rel=1e-4)
    before = vectors.tasks[vectors.tasks.index("en_fr") - 1]
    for edit, expected in zip(
        made["other task"].inject("en_fr", None), own.inject(before, None), strict=True
    ):
        assert torch.equal(edit.vector, expected.vector)
    shuffled = tv.control_vectors(
        own,
        model,
        [e for e in episodes if e.n_shots > 1],
        kinds=["shuffled labels"],
        extract=lambda m, some: TwoLayers(tv.task_vectors(tv.collect(m, some)), (0, 2)),
    )
    assert shuffled["shuffled labels"].inject("en_fr", None)[0].vector.shape == (32,)


@pytest.mark.model
def test_function_vectors_are_task_vectors_that_are_added(
    model: Any, episodes: list[tv.Episode], tmp_path: Path
) -> None:
    few = [e for e in episodes if e.n_shots == 2]
    vectors = tv.function_vectors(model, few, n_heads=4)
    assert vectors.source.mode == "add" and len(vectors.source.heads) == 4
    assert [edit.mode for edit in vectors.inject("en_fr", 1)] == ["add"]
    assert vectors.layers == (0, 1, 2)
    assert torch.equal(vectors["en_fr", 0], vectors["en_fr", 2])
    vectors.save(tmp_path / "heads.safetensors")
    again = tv.TaskVectors.load(tmp_path / "heads.safetensors", model)
    assert again.source == vectors.source and torch.equal(again.values, vectors.values)
    everywhere = replace(vectors, values=vectors.values.clone())
    everywhere.save(tmp_path / "full.safetensors")
    sizes = [(tmp_path / name).stat().st_size for name in ("heads.safetensors", "full.safetensors")]
    assert sizes[1] - sizes[0] == vectors.values[:, 1:].numel() * 4, "stored once, not per layer"
    sweep = tv.layer_sweep(model, tv.zero_shot(few), vectors)
    alone = tv.evaluate(model, tv.zero_shot(few[:1]), vectors.inject(few[0].task, 1))
    assert float(sweep.loss[0, 1, 0]) == pytest.approx(float(alone.loss[0]), abs=1e-3)
    with pytest.raises(ValueError, match="these are function vectors; say how they are made"):
        tv.control_vectors(vectors, model, few, kinds=["zero-shot"])


def test_vectors_and_episodes_agree_in_the_use_of_a_bos(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    assert vectors.source.bos is False
    tv.layer_sweep(model, zoo.with_bos(episodes[:2], False), vectors)
    with_one = zoo.with_bos(episodes, True)
    for call in (
        lambda: tv.layer_sweep(model, with_one, vectors),
        lambda: tv.perturbation_matrix(model, with_one, vectors, 1),
        lambda: tv.steering_effect(model, with_one, vectors, 1, null="en_fr"),
    ):
        with pytest.raises(ValueError, match="prompts without a BOS, and the episodes' prompts"):
            call()
    other = tv.task_vectors(tv.collect(model, with_one))
    with pytest.raises(ValueError, match="prompts with a BOS"):  # by habit these have none
        tv.layer_sweep(model, episodes, other)
