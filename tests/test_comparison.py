from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import binomtest
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
    assert list(found.table()) == ["accuracy", "bad", "good", "n_distinct"]
    assert list(found.table().index) == ["a", "b"]
    assert found.table().good["a"].startswith(f"{found.differences.other[2]:.2f} [0.")


def test_equal_answers_differ_by_nothing() -> None:
    same = scores(drawn(0.5, 0))
    frame = tv.compare(same, same).to_frame()
    assert (frame.difference == 0).all() and (frame.p_holm == 1).all()
    assert frame.against.unique().tolist() == ["baseline"]


def test_only_the_same_queries_in_the_same_order_are_compared() -> None:
    with pytest.raises(ValueError, match="'baseline' are of other queries"):
        tv.compare(scores(drawn(0.5, 0)), scores(drawn(0.5, 0), n_tasks=3))
    with pytest.raises(ValueError, match="nothing to compare"):
        tv.compare(scores(drawn(0.5, 0)), {})
    ours = scores(drawn(0.5, 0))
    with pytest.raises(ValueError, match="other queries"):
        tv.compare(ours, replace(ours, queries=ours.queries + 1))
    with pytest.raises(ValueError, match="other queries"):
        tv.compare(ours, ours.select(torch.arange(120).flip(0)))
    with pytest.raises(ValueError, match="have stop='separator', and those .* stop=None"):
        tv.compare(ours, replace(ours, stop="separator"))


def asked_five_times(right: list[int]) -> tv.Scores:
    """Scores of five episodes each of some queries; of each, so many are right."""
    correct = torch.tensor([[i < n for i in range(5)] for n in right]).T.flatten()
    queries = torch.arange(len(right)).repeat(5)
    metrics = {"correct": correct, "loss": correct.float()}
    return tv.Scores(metrics, torch.zeros_like(queries), ("t",), queries)


def test_episodes_of_one_query_count_once() -> None:
    ours, other = asked_five_times([5] * 5 + [0] * 3), asked_five_times([0] * 8)
    [row] = tv.compare(ours, other).to_frame().itertuples()
    once = [of.select(torch.arange(8)) for of in (ours, other)]
    [alone] = tv.compare(*once).to_frame().itertuples()
    assert (row.n, row.n_distinct) == (40, 8) and (alone.n, alone.n_distinct) == (8, 8)
    assert row[3:-2] == alone[3:-2]
    assert row.p == pytest.approx(2 / 2**5) and row.difference == 5 / 8


def test_queries_that_are_partly_right_are_compared_by_the_sign_of_their_means() -> None:
    ours, other = (
        asked_five_times([3, 4, 5, 2, 1, 0, 5, 1]),
        asked_five_times([2, 4, 1, 1, 0, 1, 0, 0]),
    )
    [row] = tv.compare(ours, other).to_frame().itertuples()
    assert row.p == pytest.approx(binomtest(6, 7).pvalue)
    assert row.difference == pytest.approx((1 + 0 + 4 + 1 + 1 - 1 + 5 + 1) / 40)
    assert -1 <= row.low < row.difference < row.high <= 1


def test_a_difference_that_is_everywhere_the_same_still_has_a_width() -> None:
    every, none = (scores(torch.full((40,), one)) for one in (True, False))
    frame = tv.compare(every, {"none": none, "same": every}).to_frame()
    assert (frame.high - frame.low > 0.2).all()
    assert frame.low.between(-1, 1).all() and frame.high.between(-1, 1).all()


def test_few_shot_and_zero_shot_scores_of_one_query_are_compared() -> None:
    toy = tv.load_model("toy", device="cpu")
    episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 8, 4, seed=0)
    few, none = tv.evaluate(toy, episodes), tv.evaluate(toy, tv.zero_shot(episodes))
    assert (tv.compare(few, none).to_frame().difference > 0).any()


def test_a_task_without_scores_is_named() -> None:
    toy = tv.load_model("toy", device="cpu")
    every = tv.evaluate(toy, tv.sample_episodes(tv.bitwise_tasks(null=False), 6, 4, seed=0))
    some = every.select(every.labels > 0)
    with pytest.raises(ValueError, match="no scores of task 'AND'"):
        tv.compare(some, some)


def after_sets(right: list[int], demo_sets: bool = True) -> tv.Scores:
    """Scores of one task's queries, so many right of five after each set of demonstrations."""
    correct = torch.tensor([[i < n for i in range(5)] for n in right]).flatten()
    queries = torch.arange(len(correct))
    metrics = {"correct": correct, "loss": correct.float()}
    sets = queries // 5 if demo_sets else None
    return tv.Scores(metrics, torch.zeros_like(queries), ("t",), queries, demo_sets=sets)


def test_differences_after_shared_demonstrations_are_of_sets() -> None:
    ours, other = [5, 5, 5, 5, 5, 5, 0, 0], [0, 0, 0, 0, 0, 0, 1, 5]
    shared = [after_sets(one) for one in (ours, other)]
    fresh = [after_sets(one, demo_sets=False) for one in (ours, other)]
    [row] = tv.compare(*shared).to_frame().itertuples()
    [alone] = tv.compare(*fresh).to_frame().itertuples()
    assert alone.p == pytest.approx(binomtest(30, 36).pvalue)
    assert row.p == pytest.approx(binomtest(6, 8).pvalue) and row.n_sets == 8
    assert row.difference == alone.difference == 24 / 40
    assert row.low < alone.low < alone.high < row.high
    [half] = tv.compare(shared[0], fresh[1]).to_frame().itertuples()
    assert (half.p, half.low, half.high) == (row.p, row.low, row.high)


def test_differences_between_prompts_that_share_otherwise_are_refused() -> None:
    ours = after_sets([1, 2, 3, 4, 5, 0, 1, 2])
    other = replace(ours, demo_sets=ours.queries % 8)
    with pytest.raises(ValueError, match="'baseline' share their demonstrations between other"):
        tv.compare(ours, other)
    renamed = replace(ours, demo_sets=7 - ours.queries // 5)
    assert tv.compare(ours, renamed).to_frame().p[0] == 1


def test_a_difference_that_only_some_sets_make_is_rarely_significant() -> None:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):  # each set of demonstrations favours one of two equal conditions
        lean = torch.rand(10, 1, generator=generator) < 0.5
        correct = (torch.rand(10, 10, generator=generator) < 0.7) & lean
        other = (torch.rand(10, 10, generator=generator) < 0.7) & ~lean
        both = [
            replace(scores(of.flatten(), 1), demo_sets=torch.arange(100) // 10)
            for of in (correct, other)
        ]
        [row] = tv.compare(*both).to_frame().itertuples()
        naive = [replace(one, demo_sets=None) for one in both]
        [alone] = tv.compare(*naive).to_frame().itertuples()
        found.append((row.p < 0.05, row.low <= 0 <= row.high, alone.p < 0.05))
    wrong, covers, naive_wrong = torch.tensor(found).double().mean(dim=0).tolist()
    assert wrong < 0.05 and covers > 0.93 and naive_wrong > 0.3
