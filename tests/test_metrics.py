"""Metrics of an answer: each against one unpadded run by hand, and carried by every result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import transformer_lens_taskvec as tv
from transformer_lens_taskvec._utils.metrics import METRICS, Answered

pytestmark = pytest.mark.filterwarnings("ignore:.*one intervention at a time")
NAMED = ["rank", "probability", "entropy", "margin"]


def first_token_logit(logits: torch.Tensor, answer: torch.Tensor) -> float:
    return float(logits[0, answer[0]])


def by_hand(model: Any, episode: tv.Episode) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that predict the answer, and its token ids, from one run."""
    encode = model.tokenizer.encode
    prompt = encode(episode.prompt, add_special_tokens=False)
    answer = encode(episode.answer, add_special_tokens=False)
    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([prompt + answer]), fwd_hooks=[])
    return logits[0, len(prompt) - 1 : -1], torch.tensor(answer)


@pytest.mark.model
def test_metrics_are_those_of_one_run_each(model: Any, episodes: list[tv.Episode]) -> None:
    scores = tv.evaluate(model, episodes, metrics=[*NAMED, first_token_logit])
    assert list(scores.metrics) == ["correct", "loss", *NAMED, "first_token_logit"]
    assert len({len(by_hand(model, e)[1]) for e in episodes}) > 1, "answers of several lengths"
    for row, episode in enumerate(episodes):
        logits, answer = by_hand(model, episode)
        spread = logits.log_softmax(dim=-1)
        own = logits[range(len(answer)), answer]
        found = {name: float(values[row]) for name, values in scores.metrics.items()}
        log_probability = float(spread[range(len(answer)), answer].sum())
        assert found["loss"] == pytest.approx(-log_probability, abs=1e-3)
        assert found["probability"] == pytest.approx(
            float(torch.tensor(log_probability).exp()), rel=1e-2, abs=1e-12
        )
        assert found["entropy"] == pytest.approx(
            float(-(spread.exp() * spread).sum(dim=-1).mean()), abs=1e-3
        )
        others = logits.scatter(1, answer[:, None], -torch.inf).max(dim=1).values
        assert found["margin"] == pytest.approx(float((own - others).min()), abs=1e-3)
        assert (found["margin"] > 0) == bool(found["correct"]) == (found["rank"] == 0)
        ranks = (logits > own[:, None]).sum(dim=1)
        assert found["rank"] == pytest.approx(float(ranks.max()), abs=2)
        assert found["first_token_logit"] == pytest.approx(float(logits[0, answer[0]]), abs=1e-3)


@pytest.mark.model
def test_a_metric_shows_in_every_sweep_and_frame(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    asked: dict[str, Any] = {"metrics": [first_token_logit]}
    sweep = tv.layer_sweep(model, episodes, vectors, scales=(1.0, 2.0), **asked)
    matrix = tv.perturbation_matrix(model, episodes, vectors, 1, **asked)
    steering = tv.steering_effect(model, episodes, vectors, 1, null="en_fr", **asked)
    pruned = tv.head_effects(model, episodes, on=episodes, ablation="zero", **asked)
    compared = tv.compare(sweep.scores_at(1), sweep.baseline)
    columns = {
        "first_token_logit": [sweep, pruned, compared, sweep.baseline],
        "baseline_first_token_logit": [sweep],
        "delta_first_token_logit": [matrix],
        "positive_first_token_logit": [steering],
        "first_token_logit_other": [compared],
    }
    for column, results in columns.items():
        for result in results:
            assert column in result.to_frame().columns, (column, type(result))
    plain = tv.evaluate(model, episodes, **asked)
    edits = {task: vectors.inject(task, 1) for task in vectors.tasks}
    [moved] = tv.evaluate_many(model, episodes, lambda task: [edits[task]], **asked)
    frame = sweep.to_frame().set_index(["scale", "layer", "task"])
    for index, task in enumerate(plain.tasks):
        own = moved.of(task).mean("first_token_logit")
        before = plain.of(task).mean("first_token_logit")
        row = frame.loc[(1.0, 1, task)]
        assert row.first_token_logit == pytest.approx(own, abs=1e-3)
        assert row.baseline_first_token_logit == pytest.approx(before, abs=1e-3)
        at = matrix.targets.index(task)
        assert float(matrix.deltas["first_token_logit"][index, at]) == pytest.approx(
            own - before, abs=1e-3
        )


@pytest.mark.model
def test_scores_at_a_layer_keep_nothing_of_the_baseline(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    sweep = tv.layer_sweep(model, episodes, vectors, metrics=["entropy"])
    at = sweep.scores_at(0)
    assert set(at.metrics) == set(sweep.baseline.metrics)
    for name, values in at.metrics.items():
        assert values is not sweep.baseline.metrics[name]
        torch.testing.assert_close(values, sweep.metrics[name][0, 0])
    assert not torch.equal(at.metrics["entropy"], sweep.baseline.metrics["entropy"])
    only = at.select(torch.tensor([2, 0]))
    assert only.metrics["entropy"].tolist() == at.metrics["entropy"][[2, 0]].tolist()
    assert only.labels.tolist() == at.labels[[2, 0]].tolist()


def test_an_experiment_and_a_study_carry_a_metric() -> None:
    toy = tv.load_model("toy", device="cpu")
    tasks = tv.bitwise_tasks()
    found = tv.run_experiment(toy, tasks, n_shots=2, n=6, metrics=["rank"])
    assert {"zero_shot_rank", "icl_rank", "injected_rank"} <= set(found.to_frame().columns)
    assert "rank" in found.sweep.to_frame() and "rank" in found.comparison.to_frame()
    study = tv.paper.run_study(toy, tasks, shots=(1, 2), n=6, k=3, metrics=["rank"])
    assert "rank" in study.to_frame()
    told = tv.paper.prompting_study(
        toy, tasks, tv.paper.BITWISE_INSTRUCTIONS, n_shots=1, n=6, k=3, metrics=["rank"]
    )
    assert "rank" in told.to_frame()


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("ranks", "no metric 'ranks'; there are: correct, loss"),
        (lambda logits, answer: 0.0, "define it with def"),
    ],
)
def test_a_metric_needs_a_name(metric: Any, message: str) -> None:
    toy = tv.load_model("toy", device="cpu")
    episodes = tv.sample_episodes(tv.bitwise_tasks(), 1, 1, seed=0)
    with pytest.raises(ValueError, match=message):
        tv.evaluate(toy, episodes, metrics=[metric])


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*hooks? of yours")
def test_answers_of_logits_that_are_nan_are_wrong_have_no_rank_and_are_warned_about(
    model: Any, episodes: list[tv.Episode]
) -> None:
    first = model.tokenizer.decode([0])  # the argmax of NaN is the first token
    given = [*episodes, tv.Episode("first", (), tv.Example("a", first))]
    edit = ("blocks.1.hook_resid_post", lambda activation, hook: activation * torch.nan)
    with pytest.warns(UserWarning, match=rf"NaN in {len(given)} of {len(given)} answers"):
        scores = tv.evaluate(model, given, [edit], metrics=["rank", "margin", "entropy"])
    assert scores.accuracy == 0.0 and scores.metrics["rank"].isnan().all()


def test_entropy_is_known_where_a_token_cannot_follow() -> None:
    logits = torch.tensor([[[[0.0, 0.0, -torch.inf]]]])
    answered = Answered(logits, torch.tensor([[1]]), torch.tensor([[True]]))
    assert float(METRICS["entropy"](answered)) == pytest.approx(0.6931, abs=1e-4)
