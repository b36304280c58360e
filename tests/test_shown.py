"""Results show themselves in notebooks."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pytest

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab


@pytest.fixture(scope="module")
def toy() -> Any:
    return tv.load_model("toy", device="cpu")


@pytest.fixture(scope="module")
def found(toy: Any) -> dict[str, Any]:
    tasks = tv.bitwise_tasks()
    train, test = (tv.sample_episodes(tasks, 6, 2, seed=seed) for seed in (0, 1))
    activations = tv.collect(toy, train)
    vectors = tv.task_vectors(activations)
    scores = tv.evaluate(toy, test)
    return {
        "vectors": vectors,
        "decodability": tv.task_decodability(activations, 3),
        "null": tv.task_decodability(activations, 3).null(20),
        "scores": scores,
        "sweep": tv.layer_sweep(toy, test, vectors),
        "matrix": tv.perturbation_matrix(toy, test, vectors, 1),
        "steering": tv.steering_effect(toy, test, vectors, 1),
        "heads": tv.head_effects(toy, test),
        "comparison": tv.compare(scores, scores),
        "function vectors": tv.function_vectors(toy, test, 3),
        "run": lab.shipped_run(),
        "toy run": lab.shipped_toy_run(),
        "study": tv.paper.run_study(toy, tasks, shots=(1, 2), n=6, k=3),
    }


def test_every_result_is_a_line_and_a_small_table(found: dict[str, Any]) -> None:
    for name, result in found.items():
        html, frame = result._repr_html_(), result.to_frame()
        assert html.count("<tr") <= 13 and "<table" in html, name
        assert all(f"<th>{column}</th>" in html for column in frame.columns), name
        assert " at 0x" not in html
        assert ("more rows" in html) == (len(frame) > 12)


def test_whatever_shows_an_accuracy_shows_the_number_of_distinct_queries(
    toy: Any, found: dict[str, Any]
) -> None:
    tasks = tv.bitwise_tasks()
    told = tv.paper.prompting_study(toy, tasks, tv.paper.BITWISE_INSTRUCTIONS, n=6, k=3)
    experiment = tv.run_experiment(toy, tasks, n_shots=2, n=6)
    shown = {**found, "fit": found["study"].fit, "told": told, "experiment": experiment}
    names = ("sweep", "matrix", "steering", "heads", "comparison", "study", "fit", "experiment")
    for name in names:
        frame = shown[name].to_frame()
        assert (frame.n_distinct == 6 if name != "heads" else frame.n_distinct == 3).all(), name
        assert (frame.n == frame.n_distinct).all(), name
    assert (told.to_frame().n_distinct == 6 * 6).all()
    assert (found["comparison"].table().n_distinct == 6).all()
    assert len(found["scores"].to_frame()["query"].unique()) == 7 * 6


def test_vectors_less_their_mean_are_compared(found: dict[str, Any]) -> None:
    ax = tv.plot_similarity(tv.analysis.similarity(found["vectors"]))
    cosines = ax.images[0].get_array()
    assert cosines.shape == (7, 7) and cosines.diagonal().tolist() == pytest.approx([1] * 7)
    assert cosines.sum(axis=0).min() < 1  # they cancel out, so that some point away from others
    plt.close(ax.figure)
