from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import transformer_lens_taskvec as tv
from transformer_lens_taskvec._utils.statistics import share_interval
from transformer_lens_taskvec.cli import app
from transformer_lens_taskvec.experiment import enough_sets

TASKS = ["upper_case", "next_letter", "singular_plural"]
FIGURES = [
    f"{name}.{kind}"
    for name in ("decodability", "embedding", "layer_sweep")
    for kind in ("png", "svg")
]


@pytest.fixture(scope="module")
def experiment(smollm2: Any) -> tv.Experiment:
    return tv.run_experiment(smollm2, tv.find_tasks(TASKS), n_shots=4, n=8, seed=1)


def test_the_sets_share_no_query_and_the_figures_are_those_of_the_test_set(
    smollm2: Any, experiment: tv.Experiment
) -> None:
    sizes = {"train": 8, "dev": 8, "test": 8}
    sets = tv.sample_splits(tv.find_tasks(TASKS), sizes, n_shots=4, seed=1)
    vectors = tv.task_vectors(tv.collect(smollm2, sets["train"]))
    for row in experiment.to_frame().itertuples():
        test = [episode for episode in sets["test"] if episode.task == row.task]
        edit = [tv.inject(vectors[row.task, row.layer], row.layer)]
        assert row.n == 8
        assert row.icl == tv.evaluate(smollm2, test).accuracy
        assert row.zero_shot == tv.evaluate(smollm2, tv.zero_shot(test)).accuracy
        assert row.injected == tv.evaluate(smollm2, tv.zero_shot(test), edit).accuracy


def test_an_injected_vector_does_much_of_what_demonstrations_do(experiment: tv.Experiment) -> None:
    frame = experiment.to_frame().set_index("task")
    assert frame.zero_shot.mean() < 0.25
    assert frame.injected.mean() > 0.5 * frame.icl.mean() > 0.2


def test_controls_stand_beside_the_task_vectors(smollm2: Any, experiment: tv.Experiment) -> None:
    sets = tv.sample_splits(
        tv.find_tasks(TASKS), {"train": 8, "dev": 8, "test": 8}, n_shots=4, seed=1
    )
    made = tv.control_vectors(experiment.vectors, smollm2, sets["train"], seed=1)
    assert list(experiment.controls) == list(made) and len(made) == 6
    task = "next_letter"
    layer = experiment.layers[task]
    queries = tv.zero_shot([episode for episode in sets["test"] if episode.task == task])
    edit = [tv.inject(made["shuffled labels"][task, layer], layer)]
    alone = tv.evaluate(smollm2, queries, edit)
    assert alone.correct.equal(experiment.controls["shuffled labels"].of(task).correct)
    frame = experiment.to_frame()
    assert (frame.low <= frame.injected).all() and (frame.injected <= frame.high).all()
    best = experiment.comparison.to_frame().groupby("task").other.max()
    assert all(row.control <= best[row.task] for row in frame.itertuples())
    assert set(experiment.sweep.controls) == {"random"}


def test_results_are_written_whole(experiment: tv.Experiment, tmp_path: Path) -> None:
    out = tmp_path / "out"
    figures = tv.plots.experiment_figures(experiment)
    written = [*experiment.save(out), *tv.plots.save_figures(figures, out)]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert (
        names
        == sorted([*FIGURES, "results.json", "vectors.safetensors"])
        == sorted(p.name for p in written)
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["tasks"].keys() == set(TASKS)
    assert results["tasks"]["upper_case"].keys() > {"zero_shot", "icl", "injected", "p", "layer"}
    assert len(results["controls"]) == 3 * 7 and "p_holm" in results["controls"][0]
    scores = results["decodability"]["scores"]
    assert (len(scores), len(scores[0])) == (30, 3)
    assert results["settings"]["seed"] == 1
    assert results["settings"]["template"]["example"] == "example:{x}->{y}"
    assert results["source"]["bos"] is False
    assert results["versions"]["transformer-lens"]
    for name in (name for name in FIGURES if name.endswith(".png")):
        height, width, _ = plt.imread(tmp_path / "out" / name).shape
        assert height > 400 < width
    assert plt.get_fignums() == []


def test_a_task_with_too_few_queries_for_any_conclusion_says_so() -> None:
    toy = tv.load_model("toy", device="cpu")
    operators = tv.bitwise_tasks(null=False)
    few = tv.mapping_task("few", {f"{i:05b} 11111": f"{i:05b}" for i in range(15)})
    with pytest.warns(UserWarning) as caught:
        found = tv.run_experiment(toy, [operators["XOR"], few], n_shots=2, n=12)
    warned = [str(one.message) for one in caught]
    assert any("36 episodes" in text and "'few' has 15 distinct" in text for text in warned)
    assert any("Too few distinct test queries for any conclusion: 'few' 5." in w for w in warned)
    frame = found.to_frame().set_index("task")
    assert frame.n.tolist() == [12, 12] and frame.n_distinct.tolist() == [12, 5]
    assert frame.conclusive.tolist() == [True, False]
    assert frame.p["few"] > 0.05 and "for any conclusion: 'few' 5" in repr(found)
    assert found.injected.of("few").interval() == pytest.approx((0.566, 1.0), abs=1e-3)


def test_the_few_shot_accuracy_is_that_of_prompts_that_share_enough_sets() -> None:
    toy, tasks = tv.load_model("toy", device="cpu"), [*tv.bitwise_tasks(null=False).values()][:2]
    found, fresh, few = (
        tv.run_experiment(toy, tasks, n_shots=2, n=12, n_test=40, demo_sets=demo_sets)
        for demo_sets in ("enough", None, 8)
    )
    assert found.settings["demo_sets"] == 28 and fresh.settings["demo_sets"] is None
    sizes = {"train": 12, "dev": 12, "test": 40}
    for one, demo_sets in ((found, 28), (fresh, None), (few, 8)):
        sets = tv.sample_splits(tasks, sizes, 2, seed=0, demo_sets={"test": demo_sets})
        assert one.icl.correct.equal(tv.evaluate(toy, sets["test"]).correct)
        assert (one.icl.demo_sets is None) == (demo_sets is None)
        assert one.injected.demo_sets is None
        assert one.injected.correct.equal(fresh.injected.correct)  # nothing else changes
        assert one.activations.values.equal(fresh.activations.values)
    assert len(few.icl.demo_sets.unique()) == 2 * 8
    with pytest.raises(ValueError, match="demo_sets is 'many'; use a number, None or 'enough'"):
        tv.run_experiment(toy, tasks, n_shots=2, n=12, demo_sets="many")


def test_enough_sets_are_none_where_there_is_nothing_to_share_or_too_little() -> None:
    [many, few] = tv.find_tasks(["upper_case", "next_letter"]).values()
    assert [enough_sets([many], n, 8) for n in (12, 25, 40, 100)] == [None, None, 28, 40]
    assert enough_sets([many], 40, 0) is None
    assert enough_sets([many, few], 40, 8) == 28
    assert enough_sets([many, few], 40, 1) is None  # there are 25 sets of one demonstration
    assert enough_sets([many, few], 40, 24) is None  # a query less leaves 24


def test_intervals_over_enough_sets_are_at_most_a_tenth_wider() -> None:
    rng = np.random.default_rng(0)
    for n in (40, 100, 200):
        n_sets = enough_sets([], n, 8)
        queries, ratios = torch.arange(n), []
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            alike = 1 / 0.03 - 1  # a correlation of 0.03, as in tutorials/demonstration_sets.py
            own = rng.beta(share * alike, (1 - share) * alike, (1_000, n_sets))
            right = torch.from_numpy(rng.random((1_000, n)) < own[:, queries % n_sets])
            fresh = torch.from_numpy(rng.random((1_000, n)) < share)
            low, high = share_interval(right, queries, queries % n_sets)
            lower, higher = share_interval(fresh, queries)
            ratios.append(float((high - low).mean() / (higher - lower).mean()))
        assert 1.03 < np.mean(ratios) < 1.105


def test_figures_carry_axes_units_legend_and_title(experiment: tv.Experiment) -> None:
    drawn = [
        tv.plot_layer_sweep(experiment.sweep),
        tv.plot_decodability(experiment.decodability),
        tv.plot_embedding(experiment.activations, 20),
    ]
    for ax in drawn:
        assert ax.get_title()
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        entries = {text.get_text() for text in ax.get_legend().get_texts()}
        assert entries >= set(TASKS)
        plt.close(ax.figure)


@pytest.mark.slow
def test_the_command_gives_the_same_results_for_the_same_seed(tmp_path: Path) -> None:
    texts = []
    for name in ("one", "two"):
        arguments = ["--tasks", "upper_case,next_letter", "--shots", "2", "--n", "6"]
        outcome = CliRunner().invoke(app, ["run", *arguments, "--out", str(tmp_path / name)])
        assert outcome.exit_code == 0, outcome.output
        assert "task decodability peaks at layer" in outcome.output
        texts.append((tmp_path / name / "results.json").read_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "uper_case"], "no task named 'uper_case'; did you mean upper_case"),
        (["--tasks", " , "], "no task named; give at least one"),
        (["--tasks", "upper_case"], "two tasks or more"),
        (["--tasks", "next_letter,upper_case", "--shots", "25"], "at most n_shots=24"),
        (["--tasks", "next_letter,upper_case", "--n", "2"], "k is 10"),
    ],
)
def test_bad_requests_end_with_a_message_and_no_results(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = CliRunner().invoke(app, ["run", *arguments, "--out", str(out)])
    assert outcome.exit_code == 2
    assert message in outcome.output
    assert not out.exists() or list(out.iterdir()) == []


def test_an_output_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "file"
    out.write_text("mine")
    outcome = CliRunner().invoke(app, ["run", "--tasks", "upper_case,en_fr", "--out", str(out)])
    assert outcome.exit_code == 2
    assert out.read_text() == "mine"
