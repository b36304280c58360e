from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

import transformer_lens_taskvec as tv

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore:.*one intervention at a time")]


@pytest.mark.parametrize("mode", ["replace", "add", lambda a, v: 0.5 * a + v])
def test_a_layer_sweep_is_one_evaluation_a_layer_with_each_tasks_own_vector(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors, mode: Any
) -> None:
    mixed = [*episodes[::2], *episodes[1::2]]
    sweep = tv.layer_sweep(model, mixed, vectors, mode=mode, scales=(1.0, 2.5))
    assert sweep.accuracy.shape == sweep.mean_loss.shape == (3, 3)
    for row, episode in list(enumerate(mixed))[::5]:
        for scale in range(2):
            for layer in range(3):
                edit = tv.inject(
                    vectors[episode.task, layer], layer, mode=mode, scale=(1.0, 2.5)[scale]
                )
                alone = tv.evaluate(model, [episode], [edit])
                assert float(sweep.loss[scale, layer, row]) == pytest.approx(
                    float(alone.loss[0]), abs=1e-3
                )
                assert bool(sweep.correct[scale, layer, row]) == bool(alone.correct[0])
    plain = tv.evaluate(model, mixed)
    torch.testing.assert_close(sweep.baseline.loss, plain.loss, atol=1e-4, rtol=1e-4)
    frame = sweep.to_frame()
    assert len(frame) == 2 * 3 * 3
    assert torch.equal(sweep.at_scale(2.5).loss[0], sweep.loss[1])


def test_the_best_layer_has_the_highest_accuracy_and_then_the_lowest_loss() -> None:
    labels = torch.tensor([0, 0])
    correct = torch.tensor([[[1, 0], [1, 1], [1, 1]]], dtype=torch.bool)
    loss = torch.tensor([[[0.0, 0.0], [3.0, 3.0], [2.0, 2.0]]])
    metrics = {"correct": correct[0, 0], "loss": loss[0, 0]}
    baseline = tv.Scores(metrics, labels, ("t",), torch.arange(2))
    sweep = tv.LayerSweep({"correct": correct, "loss": loss}, baseline, (4, 5, 9), (1.0,))
    assert sweep.best_layer("t") == sweep.best_layer() == 9
    assert sweep.at(9).tolist() == [1.0]
    with pytest.raises(ValueError, match="no task 'u'"):
        sweep.best_layer("u")


def test_layers_whose_means_differ_by_rounding_are_tied_and_a_loss_of_nan_is_the_worst() -> None:
    rights = [[1, 2, 3], [3, 1, 2], [2, 3, 1], [2, 3, 1]]  # of ten, for each task
    correct = torch.tensor([[[i < n for n in row for i in range(10)] for row in rights]])
    loss = torch.tensor([3.0, 2.0, 1.0, torch.nan])[None, :, None].expand(1, 4, 30)
    labels = torch.arange(3).repeat_interleave(10)
    metrics = {"correct": correct[0, 0], "loss": loss[0, 0]}
    baseline = tv.Scores(metrics, labels, ("a", "b", "c"), torch.arange(30))
    sweep = tv.LayerSweep({"correct": correct, "loss": loss}, baseline, (0, 1, 2, 3), (1.0,))
    assert sweep.best_layer() == 2


def test_controls_stand_only_next_to_the_scale_they_were_injected_at(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    sweep = tv.layer_sweep(model, episodes, vectors, scales=(1.0, 0.5), controls=True)
    frame = sweep.to_frame()
    assert frame[frame.scale == 1.0]["control: random"].notna().all()
    assert frame[frame.scale == 0.5]["control: random"].isna().all()
    assert not sweep.at_scale(0.5).controls
    assert list(sweep.at_scale(1.0).controls) == list(sweep.controls)


def test_a_perturbation_matrix_is_one_evaluation_a_vector(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    matrix = tv.perturbation_matrix(model, episodes, vectors, layer=1)
    plain = tv.evaluate(model, episodes)
    for column, target in enumerate(matrix.targets):
        moved = tv.evaluate(model, episodes, [tv.inject(vectors[target, 1], 1)])
        for row, source in enumerate(matrix.sources):
            change = moved.of(source).mean_loss - plain.of(source).mean_loss
            assert float(matrix.delta_loss[row, column]) == pytest.approx(change, abs=1e-3)
    off = [float(matrix.delta_loss[i, j]) for i in range(3) for j in range(3) if i != j]
    own = [float(matrix.delta_loss[i, i]) for i in range(3)]
    expected = sum(off) / 6 - sum(own) / 3
    assert matrix.conditional_decoding == pytest.approx(expected, abs=1e-5)
    assert len(matrix.to_frame()) == 9


def test_steering_is_the_right_tasks_mean_against_nulls(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    effect = tv.steering_effect(model, episodes, vectors, 1, null="upper_case")
    for row, episode in enumerate(episodes):
        for scores, name in ((effect.positive, episode.task), (effect.negative, "upper_case")):
            alone = tv.evaluate(model, [episode], [tv.inject(vectors[name, 1], 1)])
            assert float(scores.loss[row]) == pytest.approx(float(alone.loss[0]), abs=1e-3)
    assert list(effect.to_frame().task) == list(effect.tasks)
    with pytest.raises(ValueError, match="no vector for Null"):
        tv.steering_effect(model, episodes, vectors, 1)


def test_a_task_without_a_vector_is_named(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    strange = [tv.Episode("strange", (), episodes[0].query)]
    with pytest.raises(ValueError, match="no vector for strange; there are vectors for: singular"):
        tv.layer_sweep(model, strange, vectors)


def test_heat_maps_name_their_axes_and_show_every_value(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    matrix = tv.perturbation_matrix(model, episodes, vectors, layer=1)
    ax = tv.plot_perturbation(matrix)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(matrix.sources)
    shown = [text.get_text() for text in ax.texts]
    # Changes below two nats are shown to two digits.
    assert shown == [f"{value:+.2f}" for value in matrix.delta_loss.flatten().tolist()]
    effects = tv.head_effects(model, [e for e in episodes if e.n_shots == 2])
    heads = tv.plot_head_effects(effects)
    drawn = torch.tensor(heads.images[0].get_array().data)
    torch.testing.assert_close(drawn.float(), effects.log_probability)
    for one in (ax, heads):
        assert one.get_title()
        assert one.get_xlabel()
        assert one.get_ylabel()
        plt.close(one.figure)


def test_an_episode_that_is_repeated_changes_no_result(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    bare = tv.zero_shot(episodes)
    many = [*bare, *bare[::2], *bare[:3]]
    by = {
        "sweep": lambda some: tv.layer_sweep(model, some, vectors, metrics=["rank"]),
        "matrix": lambda some: tv.perturbation_matrix(model, some, vectors, 1, metrics=["rank"]),
        "steering": lambda some: tv.steering_effect(model, some, vectors, 1, null="en_fr"),
    }
    for name, analyse in by.items():
        once, again = analyse(bare).to_frame(), analyse(many).to_frame()
        assert (again.n > once.n).any() and (once.n == once.n_distinct).all(), name
        pd.testing.assert_frame_equal(
            once.drop(columns="n"), again.drop(columns="n"), atol=1e-3, rtol=1e-4
        )
    assert "queries (" in repr(by["sweep"](many))


def test_no_query_both_chooses_the_layer_and_is_measured_there() -> None:
    queries = torch.arange(50).repeat_interleave(2)
    labels = torch.zeros(100, dtype=torch.long)
    right = torch.rand(1, 40, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    correct = right.repeat_interleave(2, dim=2)
    metrics = {"correct": correct, "loss": correct.float()}
    baseline = tv.Scores({k: v[0, 0] for k, v in metrics.items()}, labels, ("t",), queries)
    sweep = tv.LayerSweep(metrics, baseline, tuple(range(40)), (1.0,))
    # Of pairs of equal episodes one would go to either half, and the best of noise be believed.
    assert sweep.accuracy.max() > 0.6 and sweep.held_out == pytest.approx(0.5, abs=0.08)
