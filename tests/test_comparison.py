from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

import transformer_lens_taskvec as tv


def scores(correct: torch.Tensor, n_tasks: int = 2) -> tv.Scores:
    labels = torch.arange(len(correct)) % n_tasks
    names = tuple("abcdefg"[:n_tasks])
    metrics = {"correct": correct, "loss": torch.zeros(len(correct))}
    return tv.Scores(metrics, labels, names, torch.arange(len(correct)))


def drawn(share: float, seed: int) -> torch.Tensor:
    return torch.rand(120, generator=torch.Generator().manual_seed(seed)) < share


def test_differences_are_paired_and_corrected() -> None:
    ours = scores(drawn(0.7, 0))
    others = {"half": scores(drawn(0.5, 1)), "none": scores(torch.zeros(120, dtype=torch.bool))}
    frame = tv.compare(ours, others).to_frame()
    assert frame.task.tolist() == ["a", "b"] * 2 and (frame.n == 60).all()
    for row in frame.itertuples():
        mine, other = ours.of(row.task).correct, others[row.against].of(row.task).correct
        table = [[int((mine & other).sum()), int((mine & ~other).sum())]]
        table.append([int((~mine & other).sum()), int((~mine & ~other).sum())])
        assert row.p == pytest.approx(mcnemar(table, exact=True).pvalue)
        assert row.difference == pytest.approx(row.accuracy - row.other)
        assert row.low < row.difference < row.high
    expected = multipletests(frame.p, method="holm")[1]
    assert frame.p_holm.tolist() == pytest.approx(expected.tolist())


def test_the_hardest_of_each_task_is_the_one_that_answers_most() -> None:
    ours = scores(drawn(0.9, 0))
    found = tv.compare(ours, {"bad": scores(drawn(0.1, 1)), "good": scores(drawn(0.8, 2))})
    assert found.hardest().against.tolist() == ["good", "good"]
    assert "against good" in repr(found)
    assert list(found.table()) == ["accuracy", "bad", "good"]
    assert list(found.table().index) == ["a", "b"]
    assert found.table().good["a"].startswith(f"{found.differences.other[2]:.2f} [0.")


def test_equal_answers_differ_by_nothing() -> None:
    same = scores(drawn(0.5, 0))
    frame = tv.compare(same, same).to_frame()
    assert (frame.difference == 0).all() and (frame.p_holm == 1).all()
    assert frame.against.unique().tolist() == ["baseline"]


def test_only_the_same_episodes_are_compared() -> None:
    with pytest.raises(ValueError, match="'baseline' are of other episodes"):
        tv.compare(scores(drawn(0.5, 0)), scores(drawn(0.5, 0), n_tasks=3))
    with pytest.raises(ValueError, match="nothing to compare"):
        tv.compare(scores(drawn(0.5, 0)), {})
    ours = scores(drawn(0.5, 0))
    with pytest.raises(ValueError, match="other episodes"):
        tv.compare(ours, replace(ours, queries=ours.queries + 1))
    with pytest.raises(ValueError, match="other episodes"):
        tv.compare(ours, ours.select(torch.arange(120).flip(0)))
    with pytest.raises(ValueError, match="have stop='separator', and those .* stop=None"):
        tv.compare(ours, replace(ours, stop="separator"))


def test_few_shot_and_zero_shot_scores_of_one_query_are_compared() -> None:
    toy = tv.load_model("toy", device="cpu")
    episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 8, 4, seed=0)
    few, none = tv.evaluate(toy, episodes), tv.evaluate(toy, tv.zero_shot(episodes))
    assert (tv.compare(few, none).to_frame().difference > 0).any()
