"""Methods side by side: numbers, controls, resumption, methods of the caller's, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import planted
import pytest
import torch
from typer.testing import CliRunner

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.analysis.fidelity import few_shot_answers
from transformer_lens_taskvec.benchmark import (
    CONTROLS,
    METHODS,
    OTHER_TASK,
    SAME_CHOICES,
    Method,
    MethodComparison,
)
from transformer_lens_taskvec.cli import app
from transformer_lens_taskvec.models.counted import Tallied

SIZES: dict[str, Any] = {"n_shots": 4, "n": 12, "n_dev": 8, "n_test": 16}


@pytest.fixture(scope="module")
def toy() -> Any:
    return tv.load_model("toy")


@pytest.fixture(scope="module")
def tasks() -> dict[str, tv.Task]:
    return tv.find_tasks(["XOR", "OR"])


def test_a_row_is_what_the_pieces_give(toy: Any, tasks: dict[str, tv.Task]) -> None:
    found = tv.compare_methods(toy, tasks, methods=["mean"], **SIZES)
    sizes = {"train": 12, "dev": 8, "test": 16}
    sets = tv.sample_splits(tasks, sizes, 4, 0)
    for row in found.to_frame().to_dict("records"):
        train, dev, test = (
            [one for one in sets[name] if one.task == row["task"]] for name in sizes
        )
        vectors = tv.task_vectors(tv.collect(toy, train))
        sweep = tv.layer_sweep(toy, tv.zero_shot(dev), vectors)
        assert row["layer"] == sweep.best_layer(row["task"])
        shuffled = tv.task_vectors(tv.collect(toy, CONTROLS["shuffled labels"](train, 0)))
        own, control = tv.evaluate_many(
            toy,
            tv.zero_shot(test),
            [one.inject(row["task"], row["layer"]) for one in (vectors, shuffled)],
        )
        assert row["accuracy"] == own.accuracy and row["nll"] == pytest.approx(own.mean_loss)
        assert row["shuffled labels"] == control.accuracy
        [compared] = tv.compare(own, control).to_frame().to_dict("records")
        assert row["gain"] == compared["difference"] and row["p"] == compared["p"]
        few_shot = tv.evaluate(toy, test).accuracy
        assert found.baselines[row["task"]]["few_shot"]["accuracy"] == few_shot
        assert row["tokens"] >= sum(len(toy.tokenizer(one.prompt)["input_ids"]) for one in train)


def test_controls_break_the_mapping_and_keep_inputs_and_outputs() -> None:
    [task] = tv.find_tasks(["upper_case"]).values()
    episodes = tv.sample_episodes([task], n=12, n_shots=5, seed=0)
    shuffled, permuted = (CONTROLS[kind](episodes, 1) for kind in CONTROLS)
    for before, other, fixed in zip(episodes, shuffled, permuted, strict=True):
        assert [demo.x for demo in other.demos] == [demo.x for demo in before.demos]
        assert sorted(demo.y for demo in other.demos) == sorted(demo.y for demo in before.demos)
        for one in (other, fixed):
            assert one.query.x == before.query.x and one.query.y != before.query.y
            assert all(new.y != old.y for new, old in zip(one.demos, before.demos, strict=True))
    mapping: dict[str, set[str]] = {}
    for episode in permuted:
        for one in (*episode.demos, episode.query):
            mapping.setdefault(one.x, set()).add(one.y)
    assert all(len(outputs) == 1 for outputs in mapping.values())  # one mapping in all prompts
    known = {one.y for episode in episodes for one in (*episode.demos, episode.query)}
    assert {y for outputs in mapping.values() for y in outputs} == known


def test_other_controls_are_of_the_same_heads_and_of_another_task(toy: Any) -> None:
    tasks = tv.find_tasks(["XOR", "OR", "XNOR"])
    kinds = ["shuffled labels", SAME_CHOICES, OTHER_TASK]
    methods = ["function vector", "mean"]
    found = tv.compare_methods(toy, tasks, methods=methods, controls=kinds, **SIZES)
    rows = found.to_frame().set_index(["method", "task"])
    sizes = {"train": 12, "dev": 8, "test": 16}
    sets = tv.sample_splits(tasks, sizes, 4, 0)
    own = rows.loc["function vector", "XOR"]
    test = [one for one in tv.zero_shot(sets["test"]) if one.task == "XOR"]
    vectors = METHODS["function vector"].make(toy, sets["train"])
    shuffled = CONTROLS["shuffled labels"](sets["train"], 0)
    same = tv.function_vectors(toy, shuffled, heads=vectors.source.heads)
    assert same.source.heads == vectors.source.heads
    edits = same.inject("XOR", int(own.layer), scale=float(own.scale))
    assert own[SAME_CHOICES] == tv.evaluate(toy, test, edits).accuracy
    assert rows[SAME_CHOICES]["mean"].isna().all()  # it chooses nothing
    # Of the same inputs and answers, but never the same for one input.
    mean = rows.loc["mean", "XOR"]
    other = tv.task_vectors(tv.collect(toy, [e for e in sets["train"] if e.task == "XNOR"]))
    edits = other.inject("XNOR", int(mean.layer))
    assert mean[OTHER_TASK] == tv.evaluate(toy, test, edits).accuracy < 0.2

    def of_one(model: Any, episodes: Any) -> tv.TaskVectors:
        if episodes[0].task != "XOR":
            raise ValueError("cannot do it")
        return tv.task_vectors(tv.collect(model, episodes))

    with pytest.warns(UserWarning, match="cannot do it"):
        own = tv.compare_methods(toy, tasks, methods={"one": of_one}, controls=kinds, **SIZES)
    assert [unit["error"] for unit in own.units] == ["cannot do it"] * 3
    with pytest.raises(ValueError, match="which some methods or tasks do not have"):
        tv.compare_methods(toy, tasks, methods=["mean"], controls=[OTHER_TASK], **SIZES)


def test_function_vectors_sum_the_heads_that_are_given(toy: Any, tasks: dict[str, tv.Task]) -> None:
    episodes = tv.sample_episodes(tasks, n=8, n_shots=4, seed=0)
    heads = [(1, 0), (2, 3)]
    found = tv.function_vectors(toy, episodes, heads=heads)
    z = tv.collect(toy, [e for e in episodes if e.task == "OR"], hook="z").values.mean(dim=0)
    by_hand = sum(z[layer, head] @ toy.blocks[layer].attn.W_O[head] for layer, head in heads)
    torch.testing.assert_close(found["OR", 0], by_hand.detach(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="heads is .*below 4 and 4"):
        tv.function_vectors(toy, episodes, heads=[(1, 4)])
    with pytest.raises(ValueError, match="both given"):
        effects = tv.head_effects(toy, episodes)
        tv.function_vectors(toy, episodes, heads=heads, effects=effects)


def test_a_permutation_needs_two_inputs() -> None:
    episode = tv.Episode("t", (), tv.Example("a", "b"))
    with pytest.raises(ValueError, match="'t' has one input"):
        tv.prompts.permute_mapping([episode], 0)


def test_results_are_kept_and_taken_up_again(
    toy: Any, tasks: dict[str, tv.Task], tmp_path: Path
) -> None:
    calls: list[str] = []

    def mine(model: Any, episodes: Any) -> tv.TaskVectors:
        calls.append(episodes[0].task)
        return tv.task_vectors(tv.collect(model, episodes))

    own = {"mine": mine}
    found = tv.compare_methods(toy, tasks, methods=own, out=tmp_path, **SIZES)
    assert calls == ["XOR", "XOR", "OR", "OR"]  # and each with its control
    again = tv.compare_methods(toy, tasks, methods=own, out=tmp_path, **SIZES)
    assert len(calls) == 4 and again.to_json() == found.to_json()
    kept = json.loads((tmp_path / "results.json").read_text())
    kept["units"] = [unit for unit in kept["units"] if unit["task"] != "OR"]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    tv.compare_methods(toy, tasks, methods=own, out=tmp_path, **SIZES)
    assert calls[4:] == ["OR", "OR"]
    assert MethodComparison.load(tmp_path).headline == found.headline
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        tv.compare_methods(toy, tasks, methods=own, out=tmp_path, seed=1, **SIZES)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        MethodComparison.load(tmp_path)


def test_a_method_that_cannot_be_used_is_named(toy: Any, tasks: dict[str, tv.Task]) -> None:
    def impossible(model: Any, episodes: Any) -> Any:
        raise ValueError("it has no such thing")

    methods = {"impossible": impossible, "mean": METHODS["mean"].make}
    with pytest.warns(UserWarning, match="impossible, XOR: it has no such thing"):
        found = tv.compare_methods(toy, tasks, methods=methods, **SIZES)
    assert list(found.to_frame().method.unique()) == ["mean"]
    assert "impossible, OR: it has no such thing" in repr(found)


def test_the_headline_ranks_methods_by_the_tasks_they_carry(
    toy: Any, tasks: dict[str, tv.Task]
) -> None:
    def mean_of_all(model: Any, episodes: Any) -> tv.TaskVectors:
        means = tv.task_vectors(tv.collect(model, episodes))
        return replace(means, values=means.values.mean(dim=0, keepdim=True).expand_as(means.values))

    methods = [Method("of all tasks", mean_of_all, together=True), METHODS["mean"]]
    found = tv.compare_methods(toy, tasks, methods=methods, **SIZES)
    assert found.headline.startswith("mean carries the mapping on 2 of 2 tasks")
    summary = found.summary().set_index("method")
    assert summary.gain["mean"] > summary.gain["of all tasks"]
    axes = tv.plot_methods(found)
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["mean", "of all tasks"]
    texts = {text.get_text() for text in axes.texts}
    row = found.to_frame().set_index(["method", "task"]).loc[("mean", "XOR")]
    assert f"{row.accuracy:.2f} \u2022\n{row['shuffled labels']:.2f}" in texts
    plt.close("all")


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if not one.learned])
def test_every_extracted_method_runs_on_the_planted_model(name: str) -> None:
    model = planted.planted()
    options: dict[str, Any] = {"n_shots": 3, "n": 6, "n_dev": 6, "n_test": 6}
    found = tv.compare_methods(
        model,
        planted.tasks(),
        methods=[name],
        template=planted.TEMPLATE,
        controls=["random"],
        **{**options, "n": 2, "n_dev": 2, "n_test": 2},
    )
    frame = found.to_frame()
    assert len(frame) == 3, found
    assert frame.accuracy.between(0, 1).all()
    if name in ("mean", "one prompt", "contrast", "state vector", "several of few shots"):
        assert (frame.accuracy == 1).all(), frame


def test_learned_methods_run_on_the_toy_model(toy: Any, tasks: dict[str, tv.Task]) -> None:
    some = {"XOR": tasks["XOR"]}
    learned = [name for name, one in METHODS.items() if one.learned]
    found = tv.compare_methods(toy, some, methods=learned, **SIZES)
    frame = found.to_frame().set_index("method")
    assert frame.accuracy["learned"] > 0.8
    assert frame["shuffled labels"]["learned"] < 0.5


def test_divergence_is_that_from_the_few_shot_answers(toy: Any, tasks: dict[str, tv.Task]) -> None:
    episodes = tv.sample_episodes(tasks, n=5, n_shots=4, seed=0)
    scores, metric = few_shot_answers(toy, episodes)
    assert torch.equal(scores.loss, tv.evaluate(toy, episodes).loss)
    [same] = tv.evaluate_many(toy, episodes, [[]], metrics=[metric])
    assert float(same.metrics["divergence"].abs().max()) < 1e-5
    bare = tv.zero_shot(episodes)
    [other] = tv.evaluate_many(toy, bare, [[]], metrics=[metric])
    for row in (0, 7):
        logp = []
        for episode in (episodes[row], bare[row]):
            tokens = torch.tensor([toy.tokenizer(episode.prompt)["input_ids"]])
            logp.append(toy(tokens)[0, -1].detach().log_softmax(dim=-1))
        by_hand = float((logp[0].exp() * (logp[0] - logp[1])).sum())
        assert float(other.metrics["divergence"][row]) == pytest.approx(by_hand, abs=1e-4)
    unknown = tv.sample_episodes(tasks, n=5, n_shots=4, seed=9)
    with pytest.raises(KeyError, match="was not given"):
        tv.evaluate_many(toy, unknown, [[]], metrics=[metric])


def test_a_tallied_model_gives_the_same_and_adds_up(toy: Any, tasks: dict[str, tv.Task]) -> None:
    episodes = tv.sample_episodes(tasks, n=5, n_shots=4, seed=0)
    tallied = Tallied(toy)
    found = tv.collect(tallied, episodes)
    assert torch.equal(found.values, tv.collect(toy, episodes).values)
    assert found.source == tv.collect(toy, episodes).source
    assert tallied.tokens > 0


def test_the_best_scale_and_layer_are_over_both(toy: Any, tasks: dict[str, tv.Task]) -> None:
    episodes = tv.sample_episodes(tasks, n=10, n_shots=4, seed=0)
    vectors = tv.task_vectors(tv.collect(toy, episodes))
    sweep = tv.layer_sweep(toy, tv.zero_shot(episodes), vectors, scales=(0.0, 1.0))
    assert sweep.best("XOR") == (1.0, 1)
    with pytest.raises(ValueError, match="no task 'NOR'"):
        sweep.best("NOR")


def test_mistakes_are_named(toy: Any, tasks: dict[str, tv.Task]) -> None:
    with pytest.raises(ValueError, match="no method 'means'"):
        tv.compare_methods(toy, tasks, methods=["means"], **SIZES)
    with pytest.raises(ValueError, match="no control 'other'"):
        tv.compare_methods(toy, tasks, controls=["other"], **SIZES)
    with pytest.raises(ValueError, match="controls is 'random'"):
        tv.compare_methods(toy, tasks, controls="random", **SIZES)
    with pytest.raises(ValueError, match="a name of its own"):
        tv.compare_methods(toy, tasks, methods=["mean", "mean"], **SIZES)


def test_the_command_writes_table_and_figure(tmp_path: Path) -> None:
    arguments = ["bench", "--model", "toy", "--tasks", "XOR,OR", "--methods", "mean,one prompt"]
    sizes = ["--shots", "4", "--n", "8", "--n-dev", "6", "--n-test", "6"]
    done = CliRunner().invoke(app, [*arguments, *sizes, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "carries the mapping on" in done.output
    assert (tmp_path / "methods.png").stat().st_size > 5000
    assert len(json.loads((tmp_path / "results.json").read_text())["units"]) == 4
