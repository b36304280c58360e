"""Studies of a model: TD and accuracy from one pass, fits, checkpoints, finetuning."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import zoo
from scipy.stats import linregress
from typer.testing import CliRunner

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.activations import Source
from transformer_lens_taskvec.analysis.pooling import input_embeddings
from transformer_lens_taskvec.cli import app
from transformer_lens_taskvec.models.tokens import encode_answers, encode_prompts, note_bos_habit
from transformer_lens_taskvec.paper import finetune
from transformer_lens_taskvec.paper.finetune import same_outside
from transformer_lens_taskvec.paper.runner import (
    write_checkpoint_study,
    write_instruction_study,
    write_shot_study,
)
from transformer_lens_taskvec.paper.shots import _peak

TASKS = {name: task for name, task in tv.bitwise_tasks().items() if name in ("AND", "OR", "Null")}
SOURCE = Source("made", "resid_post", -1, "{x}->{y}", False)
SMALL: dict[str, Any] = {"n": 6, "k": 3, "shots": (1, 2)}


def decodability(td: list[float], tasks: tuple[str, ...]) -> tv.Decodability:
    labels = torch.arange(len(td)).repeat_interleave(4)
    found = tv.Activations(torch.zeros(len(labels), 1, 2), labels, tasks, (0,), SOURCE)
    return tv.Decodability(torch.tensor(td)[labels][None], found, 10)


def scores(accuracy: list[float], tasks: tuple[str, ...]) -> tv.Scores:
    correct = torch.tensor([[i < 20 * share for i in range(20)] for share in accuracy])
    labels = torch.arange(len(accuracy)).repeat_interleave(20)
    metrics = {"correct": correct.flatten(), "loss": torch.zeros(correct.numel())}
    return tv.Scores(metrics, labels, tasks, torch.arange(len(labels)))


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
@pytest.mark.parametrize("max_tokens", [None, 300])
def test_one_pass_gives_what_two_give(model: Any, max_tokens: int | None) -> None:
    episodes = tv.sample_episodes(TASKS, 4, 2, seed=0)
    vectors = tv.task_vectors(tv.collect(model, episodes))

    def own(task: str) -> list[list[tv.Intervention]]:
        return [[], vectors.inject(task, 1)]

    activations, [scored, steered] = tv.evaluate_many(
        model, episodes, own, observe=tv.Observe(), max_tokens=max_tokens
    )
    expected = tv.steering_effect(model, episodes, vectors, 1).positive
    torch.testing.assert_close(steered.loss, expected.loss, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(
        activations.values, tv.collect(model, episodes).values, atol=1e-4, rtol=1e-4
    )
    apart = tv.evaluate(model, episodes)
    torch.testing.assert_close(scored.loss, apart.loss, atol=1e-3, rtol=1e-4)
    assert scored.correct.equal(apart.correct) and scored.labels.equal(activations.labels)
    assert all(not point.has_hooks() for point in model.hook_dict.values())


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
def test_a_study_measures_and_writes(model: Any, tmp_path: Path) -> None:
    study = tv.paper.run_study(model, TASKS, **SMALL)
    frame = study.to_frame()
    assert len(frame) == 6 and set(frame.shots) == {1, 2}
    assert ((frame.low <= frame.accuracy) & (frame.accuracy <= frame.high)).all()
    assert study.fit.points.task.isin(["AND", "OR"]).all()
    paths = study.save(tmp_path, "bitwise")
    assert {path.name for path in paths} >= {"results.json", "report.md", "pairwise_td.png"}
    saved = json.loads((tmp_path / "results.json").read_text())
    assert len(saved["results"]) == 6 and saved["td_by_layer"]["2"]["tasks"] == list(TASKS)
    report = (tmp_path / "report.md").read_text()
    assert "Llama-3.1-8B 0.53" in report and "steering_1_shot.png" in report
    assert not plt.get_fignums()
    again = tv.paper.run_study(model, TASKS, **SMALL)
    assert again.to_json() == study.to_json()


@pytest.mark.model
def test_a_recurrent_model_is_studied_the_same_way(tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match="one intervention at a time"):
        study = tv.paper.run_study(zoo.bridge("mamba", tokenizer), TASKS, n=4, k=2, shots=(1, 2))
    assert study.to_frame().td.between(0, 1).all() and study.decodability[1].layers == (0, 1, 2)


def test_the_layer_is_the_first_of_a_plateau() -> None:
    labels = torch.arange(200) % 2
    found = tv.Activations(torch.zeros(200, 4, 1), labels, ("a", "b"), (3, 4, 5, 6), SOURCE)
    hits = torch.ones(4, 200)
    hits[0, :40], hits[1, :3], hits[2, :2], hits[3, :30] = 0, 0, 0, 0
    assert _peak([tv.Decodability(hits, found, 10)]) == 4
    hits[1, :10] = 0
    assert _peak([tv.Decodability(hits, found, 10)]) == 5


def test_null_must_be_there() -> None:
    with pytest.raises(ValueError, match="no task 'Null'"):
        tv.paper.run_study(None, tv.bitwise_tasks(null=False))


def test_a_fit_is_the_least_squares_line() -> None:
    rng = np.random.default_rng(0)
    td, noise = rng.uniform(0.2, 1, (2, 6)), rng.normal(0, 0.1, (2, 6))
    accuracy = np.round(np.clip(0.8 * td + noise, 0, 1) * 20) / 20
    names = (*"ABCDE", "Null")
    fit = tv.td_vs_accuracy(
        {shots: decodability(td[i].tolist(), names) for i, shots in enumerate((1, 4))},
        {shots: scores(accuracy[i].tolist(), names) for i, shots in enumerate((1, 4))},
    )
    line = linregress(td[:, :5].flatten().astype(np.float32), accuracy[:, :5].flatten())
    assert fit.slope == pytest.approx(line.slope, abs=1e-5)
    assert fit.r2 == pytest.approx(line.rvalue**2, abs=1e-5)
    for value, interval in (
        (fit.r2, fit.r2_interval),
        (fit.slope, fit.slope_interval),
        (fit.spearman, fit.spearman_interval),
    ):
        assert interval[0] <= value <= interval[1] and interval[0] < interval[1]
    assert "R^2" in repr(fit) and len(fit.to_frame()) == 10
    plt.close(tv.plot_td_vs_accuracy(fit).figure)


def test_points_of_one_task_at_several_numbers_of_shots_are_resampled_together() -> None:
    rng = np.random.default_rng(1)
    td = np.repeat(rng.uniform(0.2, 1, 6)[None], 5, axis=0)
    accuracy = np.round(np.clip(td + np.repeat(rng.normal(0, 0.2, 6)[None], 5, 0), 0, 1) * 20) / 20
    names = tuple("ABCDEF")

    def fit(shots: int) -> tv.analysis.AccuracyFit:
        return tv.td_vs_accuracy(
            {n: decodability(td[n].tolist(), names) for n in range(shots)},
            {n: scores(accuracy[n].tolist(), names) for n in range(shots)},
        )

    # The same points five times over say no more than once.
    assert fit(5).slope_interval == pytest.approx(fit(1).slope_interval, abs=1e-6)
    with pytest.raises(ValueError, match="tasks differ between numbers of shots"):
        tv.td_vs_accuracy(
            {1: decodability([0.5] * 3, tuple("ABC")), 2: decodability([0.5] * 3, tuple("ABD"))},
            {1: scores([0.5] * 3, tuple("ABC")), 2: scores([0.5] * 3, tuple("ABD"))},
        )


def test_a_fit_needs_matching_points() -> None:
    one = {1: decodability([0.5, 0.6], ("A", "B"))}
    with pytest.raises(ValueError, match="shots differ"):
        tv.td_vs_accuracy(one, {2: scores([0.5, 0.6], ("A", "B"))})
    with pytest.raises(ValueError, match="three points"):
        tv.td_vs_accuracy(one, {1: scores([0.5, 0.6], ("A", "B"))})


def test_intervals_are_wilsons() -> None:
    low, high = scores([0.5], ("A",)).interval()
    assert (low, high) == pytest.approx((0.299, 0.701), abs=1e-3)


def test_pos_tasks_share_no_sentence_between_train_and_test() -> None:
    train, test = tv.tasks.split_pos_tasks(seed=1)
    texts = [
        {example.x for example in part["Noun"].sample(len(part["Noun"]), random.Random(0))}
        for part in (train, test)
    ]
    assert not texts[0] & texts[1] and 3.5 < len(texts[0]) / len(texts[1]) < 4.5
    with pytest.raises(ValueError, match="between 0 and 1"):
        tv.tasks.split_pos_tasks(test_share=1.0)


def test_instructions_head_the_prompt() -> None:
    episodes = tv.sample_episodes(TASKS, 1, 1, seed=0)
    told = tv.with_instructions(episodes, tv.paper.BITWISE_INSTRUCTIONS)
    assert told[0].prompt == "AND\n" + episodes[0].prompt
    assert set(tv.paper.BITWISE_INSTRUCTIONS) == set(tv.bitwise_tasks())
    assert set(tv.paper.POS_INSTRUCTIONS) == set(tv.pos_tasks())


@pytest.mark.model
def test_what_the_words_of_an_instruction_give_away_is_measured(model: Any) -> None:
    found = tv.paper.prompting_study(
        model, TASKS, tv.paper.BITWISE_INSTRUCTIONS, n_shots=2, n=10, k=3
    )
    frame = found.to_frame().set_index("condition")
    assert list(frame.index) == ["plain", "instructed", "random"]
    # The operator's name is in the prompt's words, and at random it says nothing of the task.
    assert frame.td_at_input["instructed"] > frame.td_at_input["random"] + 0.2
    assert found.of_instruction.tasks == tuple(TASKS)


@pytest.mark.model
def test_input_embeddings_are_means_over_real_tokens(model: Any) -> None:
    short = tv.sample_episodes(TASKS, 1, 0, seed=0)
    mixed = [*short, *tv.sample_episodes(TASKS, 1, 3, seed=0)]
    alone, together = (input_embeddings(model, some).values for some in (short, mixed))
    torch.testing.assert_close(alone, together[: len(short)])
    tokens = torch.tensor([model.tokenizer.encode(short[0].prompt, add_special_tokens=False)])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(alone[0, 0], cache["blocks.0.hook_resid_pre"][0].mean(dim=0))


@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
def test_checkpoints_are_studied_once_each(model: Any, tmp_path: Path) -> None:
    loaded: list[Any] = []

    def load(checkpoint: Any) -> Any:
        loaded.append(checkpoint)
        return model

    def study(loaded_model: Any) -> tv.paper.ShotStudy:
        return tv.paper.run_study(loaded_model, TASKS, steer_shots=(), **SMALL)

    first = tv.paper.over_checkpoints("org/m", [100], study, load=load, folder=tmp_path)
    both = tv.paper.over_checkpoints("org/m", [100, "rev"], study, load=load, folder=tmp_path)
    assert loaded == [100, "rev"] and both.checkpoints == (100, "rev")
    assert first.results.td.tolist() == both.results.td[:6].tolist()
    assert first.results.n_distinct.tolist() == [6] * 6
    assert len(list(tmp_path.iterdir())) == 2
    plt.close(tv.paper.plot_checkpoints(both)[0].figure)
    with pytest.raises(ValueError, match="distinct"):
        tv.paper.over_checkpoints("m", [1, 1], study, load=load)


@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
def test_results_with_other_options_are_not_reused(model: Any, tmp_path: Path) -> None:
    loaded: list[Any] = []

    def load(checkpoint: Any) -> Any:
        loaded.append(checkpoint)
        return model

    options: dict[str, Any] = {"seed": 0, "template": tv.PromptTemplate(), "progress": False}
    given = {**options, **SMALL}
    for changed in ({}, {"shots": (1, 3)}, {"k": 2}, {"template": tv.PromptTemplate("{x}: {y}")}):
        for _ in range(2):
            write_checkpoint_study("m", [1], tmp_path, load=load, **{**given, **changed})
    assert len(loaded) == 4


SETTINGS = tv.paper.LoraSettings(
    n_samples=24, n_shots=1, batch_size=4, accumulate=2, learning_rate=5e-3
)


@pytest.mark.model
def test_only_the_layers_asked_for_change(tokenizer: Any) -> None:
    hf_model = zoo.hf_model("llama")
    before = {name: value.clone() for name, value in hf_model.named_parameters()}
    tuned = tv.paper.finetune_layers(hf_model, tokenizer, TASKS, [1, 2], settings=SETTINGS)
    assert same_outside(hf_model, tuned, [1, 2]) and not same_outside(hf_model, tuned, [1])
    assert all(value.equal(before[name]) for name, value in hf_model.named_parameters())
    assert set(dict(tuned.named_parameters())) == set(before)
    episodes = tv.sample_episodes(TASKS, 8, 1, seed=9)
    nll = [
        tv.evaluate(tv.bridge_from_hf(m, tokenizer, device="cpu"), episodes).mean_loss
        for m in (hf_model, tuned)
    ]
    assert nll[1] < nll[0]
    with pytest.raises(ValueError, match="name some of 0 to 2"):
        tv.paper.finetune_layers(hf_model, tokenizer, TASKS, [3])


@pytest.mark.parametrize("accumulate", [4, 100])
def test_batches_left_over_are_trained_on_too(
    tokenizer: Any, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SETTINGS, accumulate=accumulate)  # six batches
    collated, seen = finetune._collated, []
    monkeypatch.setattr(
        finetune, "_collated", lambda rows, of: [seen.append(len(rows)), collated(rows, of)][1]
    )
    before = zoo.hf_model("llama")
    tuned = tv.paper.finetune_layers(before, tokenizer, TASKS, [0], settings=settings)
    assert sum(seen) == 24 and not same_outside(before, tuned, [])


@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("habit", [True, False])
def test_finetuning_prompts_begin_as_those_that_are_evaluated(
    tokenizer: Any, bos: bool | None, habit: bool
) -> None:
    own = copy.deepcopy(tokenizer)
    note_bos_habit(own, habit)
    settings = dataclasses.replace(SETTINGS, template=tv.PromptTemplate(bos=bos))
    [ids, n_prompt] = finetune._batches(own, TASKS, settings, 0)[0][0]
    asked = habit if bos is None else bos
    assert (ids[0] == own.bos_token_id) == asked
    assert own.decode(ids[asked:n_prompt]).endswith(" ->")


@pytest.mark.parametrize("bos", [None, True, False])
def test_finetuning_trains_on_the_tokens_that_are_evaluated(bos: bool | None) -> None:
    tokenizer = zoo.sentencepiece_tokenizer()
    settings = dataclasses.replace(SETTINGS, template=tv.PromptTemplate("{x}->{y}", bos=bos))
    trained = {
        tuple(ids) for batch in finetune._batches(tokenizer, TASKS, settings, 0) for ids, _ in batch
    }
    episodes = tv.sample_episodes(
        TASKS, settings.n_samples // len(TASKS), 1, 0, template=settings.template
    )
    model = tv.bridge_from_hf(zoo.hf_model("llama"), tokenizer, device="cpu")
    prompts, _ = encode_prompts(model, episodes)
    answers = encode_answers(model, episodes, stop="separator")
    assert trained == {(*p, *a) for p, a in zip(prompts, answers, strict=True)}


@pytest.mark.model
def test_finetuning_resumes_to_the_same_bits(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tune(folder: Path) -> Any:
        return tv.paper.finetune_layers(
            zoo.hf_model("llama"), tokenizer, TASKS, [0], settings=SETTINGS, folder=folder
        )

    whole = tune(tmp_path / "whole")
    step, taken = torch.optim.AdamW.step, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "cut")
    monkeypatch.undo()
    resumed = tune(tmp_path / "cut")
    assert same_outside(whole, resumed, [])
    with pytest.raises(ValueError, match="of another training"):
        tv.paper.finetune_layers(
            zoo.hf_model("llama"), tokenizer, TASKS, [1], settings=SETTINGS, folder=tmp_path / "cut"
        )


def test_finetuning_study_leaves_td_below_the_last_layers(tokenizer: Any) -> None:
    found = tv.paper.finetuning_study(
        zoo.hf_model("llama"),
        tokenizer,
        TASKS,
        lambda model: tv.paper.run_study(model, TASKS, steer_shots=(), metrics=["rank"], **SMALL),
        n_layers=1,
        settings=SETTINGS,
    )
    assert found.to_frame()["rank"].between(0, 49152).all()
    assert found.layers == {"pretrained": (), "first 1": (0,), "last 1": (2,)}
    assert all(found.unchanged.values())
    assert (found.td_below("last 1") == 0).all()
    assert found.to_frame().setting.tolist() == ["pretrained", "first 1", "last 1"]


def test_wrong_names_end_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind is 'poss'"):
        write_shot_study(None, "poss", tmp_path)
    result = CliRunner().invoke(app, ["study", "poss", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "no study 'poss'" in result.output
    result = CliRunner().invoke(
        app, ["study", "bitwise", "--model", "meta-llama/Llama-3.1-8C", "--out", str(tmp_path)]
    )
    assert result.exit_code == 2 and "hf auth login" in result.output
    assert "Traceback" not in result.output


def test_studies_of_the_toy_show_the_papers_findings(tmp_path: Path) -> None:
    toy = tv.load_model("toy", device="cpu")
    study = tv.paper.run_study(toy, tv.bitwise_tasks(), n=30, shots=(1, 4), n_vectors=60)
    frame = study.to_frame().set_index(["shots", "task"]).drop("Null", level="task")
    assert study.steering[1].layer == 1
    assert frame.loc[4].td.min() > 0.9
    assert frame.loc[1].positive.mean() > frame.loc[1].accuracy.mean() + 0.05
    assert frame.loc[4].negative.mean() < 0.3 < 0.95 < frame.loc[4].accuracy.mean()
    null = tv.sample_episodes({"Null": tv.bitwise_tasks()["Null"]}, 120, 4, seed=5)
    alone = tv.collect(toy, null)
    halves = dataclasses.replace(alone, labels=torch.arange(120) % 2, tasks=("one half", "other"))
    assert abs(float(tv.task_decodability(halves).at(1).mean()) - 0.5) < 0.15
    told = tv.paper.prompting_study(toy, tv.bitwise_tasks(), tv.paper.BITWISE_INSTRUCTIONS, n=30)
    seen = told.to_frame().set_index("condition")
    # The operator's name in the prompt is decodable from its words, and the model ignores it.
    assert seen.td_at_input["instructed"] > 0.8 > 0.5 > seen.td_of_instruction["random"]
    paths = write_instruction_study(toy, tmp_path, n=20)
    assert {path.name for path in paths} >= {"bitwise.png", "pos.png", "report.md"}
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"bitwise", "pos"}


def test_the_command_studies_the_toys_training_run(tmp_path: Path) -> None:
    options = ["--model", "toy", "--checkpoints", "204,1500", "--quick", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["study", "checkpoints", *options])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "results.json").read_text())
    mean = {
        step: np.mean([row["td"] for row in rows if row["checkpoint"] == step])
        for step in (204, 1500)
    }
    assert mean[204] < 0.6 < 0.85 < mean[1500]
    assert "over_checkpoints.png" in (tmp_path / "report.md").read_text()
