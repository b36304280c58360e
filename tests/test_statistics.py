"""Intervals against scipy, statsmodels and formulas of their own, and how often they cover."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import expit, gammaln, logit, xlogy
from scipy.stats import binom, bootstrap, norm, skew, t
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from transformer_lens_taskvec._utils.statistics import (
    bca_interval,
    change_interval,
    cross_fitted_best,
    effective_size,
    holm,
    mean_interval,
    means_by_query,
    paired_interval,
    share_interval,
    wilson_interval,
)

SHARES = np.linspace(0.05, 0.95, 19)
SIZES = [10, pytest.param(20, marks=pytest.mark.slow), pytest.param(40, marks=pytest.mark.slow)]
LARGE = pytest.param(100, marks=pytest.mark.slow)
FEWEST, MEAN = 0.91, 0.945
"""The least coverage anywhere, and on average, of an interval that is called one of 95 %."""


def test_wilsons_interval_is_statsmodels() -> None:
    for n in (1, 8, 40):
        counts = torch.arange(0, n + 0.5, 0.5)  # a query of several episodes counts as a fraction
        low, high = wilson_interval(counts / n, n, 0.9)
        expected = proportion_confint(counts.numpy(), n, 0.1, method="wilson")
        np.testing.assert_allclose(low, expected[0], atol=1e-7)
        np.testing.assert_allclose(high, expected[1], atol=1e-7)
    shares, sizes = torch.tensor([[0.5, 1.0]]), torch.tensor([8, 40])
    low, high = wilson_interval(shares, sizes)
    assert low.shape == (1, 2) and float(low[0, 1]) == float(wilson_interval(shares, 40)[0][0, 1])
    assert high[0, 1] == 1


def of_counts(n: int, gained: int, lost: int) -> torch.Tensor:
    return torch.tensor([1.0] * gained + [-1.0] * lost + [0.0] * (n - gained - lost))


@pytest.mark.parametrize(
    ("n", "gained", "lost"),
    [(10, 0, 0), (10, 3, 1), (20, 20, 0), (20, 0, 7), (50, 12, 2), (40, 20, 20)],
)
def test_the_interval_of_a_paired_difference_holds_what_the_score_test_keeps(
    n: int, gained: int, lost: int
) -> None:
    def score(delta: float) -> float:
        """The score test's statistic, its variance from the likeliest shares of that difference."""

        def slope(p: float) -> float:  # of the log-likelihood in the share of losses
            return (
                (gained / (p + delta) if gained else 0)
                + (lost / p if lost else 0)
                - 2 * (n - gained - lost) / (1 - 2 * p - delta)
            )

        low, high = max(0, -delta) + 1e-13, (1 - delta) / 2 - 1e-13
        likeliest = low if slope(low) <= 0 else high
        if slope(low) > 0 > slope(high):
            likeliest = brentq(slope, low, high, xtol=1e-15)
        variance = (2 * likeliest + delta - delta**2) / n
        return ((gained - lost) / n - delta) / np.sqrt(variance)

    low, high = paired_interval(of_counts(n, gained, lost))
    assert -1 <= low <= (gained - lost) / n <= high <= 1 and high - low > 0.1
    z = norm.ppf(0.975)
    if low > -1:
        assert score(low) == pytest.approx(z, abs=1e-3)
    if high < 1:
        assert score(high) == pytest.approx(-z, abs=1e-3)
    assert paired_interval(-of_counts(n, gained, lost)) == pytest.approx((-high, -low))


def test_the_interval_of_a_mean_is_students_corrected_for_skewness() -> None:
    values = np.random.default_rng(0).exponential(size=(3, 12))
    n, z = 12, t.ppf(0.95, 11)
    for row, found in zip(values, mean_interval(torch.from_numpy(values), 0.9), strict=True):
        mean, deviation, lean = row.mean(), row.std(ddof=1), skew(row, bias=False)

        def corrected(mu: float) -> float:
            """Hall's statistic, which is nearly normal and rises with the distance from mu."""
            far = (mean - mu) / deviation  # noqa: B023
            cubic = far + lean * far**2 / 3 + lean**2 * far**3 / 27 + lean / (6 * n)  # noqa: B023
            return float(np.sqrt(n) * cubic)

        assert corrected(float(found[0])) == pytest.approx(z, abs=1e-4)
        assert corrected(float(found[1])) == pytest.approx(-z, abs=1e-4)
    symmetric = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    expected = t.interval(0.95, 4, 0, np.std([-2, -1, 0, 1, 2], ddof=1) / np.sqrt(5))
    assert mean_interval(symmetric).tolist() == pytest.approx(expected, abs=1e-4)


def test_values_that_do_not_vary_have_no_width_and_one_value_has_no_interval() -> None:
    assert torch.equal(mean_interval(torch.ones(2, 9)), torch.ones(2, 2))
    assert mean_interval(torch.ones(2, 1)).isnan().all()
    low, high = mean_interval(torch.tensor([0.0, 1.0])).tolist()
    assert low < -3 and high > 4


def test_the_bca_bootstrap_is_scipys_and_leaves_out_what_is_not_a_number() -> None:
    values = np.random.default_rng(0).exponential(size=30)
    theirs = bootstrap((values,), np.mean, method="BCa", n_resamples=2_000, rng=0)
    drawn = torch.from_numpy(theirs.bootstrap_distribution)
    left_out = torch.from_numpy((values.sum() - values) / 29)
    ours = bca_interval(values.mean(), drawn, left_out)
    interval = theirs.confidence_interval
    assert ours == pytest.approx((interval.low, interval.high), abs=1e-9)
    unknown = torch.full((7,), torch.nan, dtype=torch.float64)
    assert bca_interval(values.mean(), torch.cat([drawn, unknown]), left_out) == ours
    assert np.isnan(bca_interval(0.0, unknown, left_out)).all()
    assert bca_interval(1.0, torch.ones(9), torch.ones(3)) == (1, 1)


def covered(low: np.ndarray, high: np.ndarray, truth: float) -> np.ndarray:
    return (low <= truth + 1e-9) & (truth <= high + 1e-9)


def told(name: str, n: int, coverage: list[float]) -> tuple[float, float]:
    """The least and the mean coverage, which ``pytest -s`` shows."""
    fewest, mean = min(coverage), float(np.mean(coverage))
    print(f"{name}, n = {n}: least {fewest:.3f}, mean {mean:.3f}")
    return fewest, mean


@pytest.mark.parametrize("n", [*SIZES, LARGE])
def test_intervals_of_shares_cover_as_often_as_they_say(n: int) -> None:
    counts = np.arange(n + 1)
    low, high = (end.numpy() for end in wilson_interval(torch.from_numpy(counts / n), n))
    coverage = [binom.pmf(counts, n, p)[covered(low, high, p)].sum() for p in SHARES]
    fewest, mean = told("shares", n, coverage)
    assert fewest >= FEWEST and mean >= MEAN


def outcomes(n: int) -> Iterator[tuple[int, int]]:
    return ((gained, lost) for gained in range(n + 1) for lost in range(n + 1 - gained))


@pytest.mark.parametrize("n", [*SIZES, LARGE])
def test_intervals_of_paired_differences_cover_as_often_as_they_say(n: int) -> None:
    gained, lost = np.array([*outcomes(n)]).T
    ends = [paired_interval(of_counts(n, a, b)) for a, b in zip(gained, lost, strict=True)]
    low, high = np.array(ends).T
    same = n - gained - lost
    ways = gammaln(n + 1) - gammaln(gained + 1) - gammaln(lost + 1) - gammaln(same + 1)
    coverage = []
    for p10 in (0.0, 0.02, *SHARES):
        for p01 in (0.0, 0.02, *SHARES):
            if p10 + p01 < 1 - 1e-9:
                neither = xlogy(same, 1 - p10 - p01)
                chance = np.exp(ways + xlogy(gained, p10) + xlogy(lost, p01) + neither)
                coverage.append(chance[covered(low, high, p10 - p01)].sum())
    fewest, mean = told("paired differences", n, coverage)
    assert fewest >= FEWEST and mean >= MEAN


def clusters(
    rng: np.random.Generator, share: float, alike: float, size: tuple[int, ...]
) -> np.ndarray:
    """Right answers ``[sample, query, episode]``, whose correlation within a query is ``alike``."""
    own = np.full(size[:2], share)
    if 0 < alike < 1:
        own = rng.beta(share * (1 / alike - 1), (1 - share) * (1 / alike - 1), size[:2])
    elif alike:
        own = (rng.random(size[:2]) < share).astype(float)
    return rng.random(size) < own[..., None]


@pytest.mark.parametrize("n", [8, *SIZES, LARGE])
@pytest.mark.parametrize("alike", [0.0, 0.3, 1.0])
def test_intervals_cover_where_every_query_has_five_episodes(n: int, alike: float) -> None:
    rng = np.random.default_rng(0)
    queries = torch.arange(n).repeat_interleave(5)
    coverage, naive = [], []
    for share in SHARES:
        right = clusters(rng, share, alike, (4_000, n, 5)).reshape(4_000, -1)
        means = means_by_query(torch.from_numpy(right), queries).mean(dim=-1)
        ends = [end.numpy() for end in wilson_interval(means, n)]
        coverage.append(covered(*ends, share).mean())
        naive.append(covered(*(e.numpy() for e in wilson_interval(means, 5 * n)), share).mean())
    fewest, mean = told(f"five episodes per query, correlation {alike}", n, coverage)
    assert fewest >= FEWEST - 0.01 and mean >= MEAN - 0.002  # drawn, not computed
    fewest, mean = told("  counting episodes", n, naive)
    assert alike == 0 or (fewest < 0.8 and mean < 0.83)


SETS = [
    pytest.param(n_sets, size, marks=[pytest.mark.slow] if (n_sets, size) != (8, 5) else [])
    for n_sets in (8, 10, 20)
    for size in (5, 10, 20)
]
"""Sets of demonstrations, and the queries asked after each."""
ALIKE = (0.0, 0.05, 0.1, 0.2, 0.3)
ACCURACIES = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


def after_sets(
    rng: np.random.Generator, share: float, alike: float, size: tuple[int, ...], kind: str
) -> tuple[np.ndarray, float]:
    """Right answers ``[sample, set, query]`` and their true share.

    The sets' shares are beta-distributed with a correlation of ``alike`` within sets, or logistic
    normal with a deviation of 6 ``alike``.
    """
    if kind == "beta":
        return clusters(rng, share, alike, size), share
    grid = norm.ppf((np.arange(4_000) + 0.5) / 4_000)
    own = expit(logit(share) + 6 * alike * rng.normal(size=size[:2]))
    truth = expit(logit(share) + 6 * alike * grid).mean()
    return rng.random(size) < own[..., None], float(truth)


def as_episodes(right: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, queries and sets of ``[sample, set, query]``."""
    queries = torch.arange(right[0].size)
    return torch.from_numpy(right.reshape(len(right), -1)), queries, queries // right.shape[2]


@pytest.mark.parametrize("kind", ["beta", "logistic normal"])
@pytest.mark.parametrize(("n_sets", "size"), SETS)
def test_intervals_cover_where_queries_share_demonstrations(
    n_sets: int, size: int, kind: str
) -> None:
    rng = np.random.default_rng(0)
    coverage: list[float] = []
    naive: list[float] = []
    for alike in ALIKE:
        for share in ACCURACIES:
            right, truth = after_sets(rng, share, alike, (4_000, n_sets, size), kind)
            values, queries, sets = as_episodes(right)
            for found, given in ((coverage, sets), (naive, None)):
                low, high = (end.numpy() for end in share_interval(values, queries, given))
                found.append(covered(low, high, truth).mean())
    fewest, mean = told(f"{kind} sets, {n_sets} x {size} queries", n_sets * size, coverage)
    assert fewest >= FEWEST and mean >= MEAN
    fewest, _ = told("  counting queries alone", n_sets * size, naive)
    assert fewest < 0.86


@pytest.mark.parametrize(("n_sets", "size"), SETS)
def test_intervals_of_paired_differences_cover_where_queries_share_demonstrations(
    n_sets: int, size: int
) -> None:
    rng = np.random.default_rng(0)
    coverage = []
    for alike in ALIKE:
        for gains, losses in ((0.05, 0.25), (0.3, 0.15), (0.5, 0.02), (0.6, 0.0)):
            shares = np.array([gains, losses, 1 - gains - losses])
            own = np.broadcast_to(shares, (400, n_sets, 3))
            if alike:
                own = rng.dirichlet(np.maximum(shares, 1e-9) * (1 / alike - 1), (400, n_sets))
            drawn, first, second = rng.random((400, n_sets, size)), own[..., :1], own[..., 1:2]
            right = (drawn < first).astype(float)
            right -= (drawn >= first) & (drawn < first + second)
            values, queries, sets = as_episodes(right)
            n, df = effective_size(values, queries, sets)
            ends = [
                paired_interval(row, n=float(size), df=df)
                for row, size in zip(values, n, strict=True)
            ]
            coverage.append(covered(*np.array(ends).T, gains - losses).mean())
    fewest, mean = told(f"paired differences, {n_sets} sets x {size}", n_sets * size, coverage)
    assert fewest >= FEWEST and mean >= MEAN


@pytest.mark.parametrize(("n_sets", "size"), SETS)
def test_intervals_of_changes_cover_where_queries_share_demonstrations(
    n_sets: int, size: int
) -> None:
    rng = np.random.default_rng(0)
    coverage = []
    for alike in ALIKE:
        of_sets, own = (rng.exponential(size=(4_000, n_sets, k)) - 1 for k in (1, size))
        values, queries, sets = as_episodes(own + np.sqrt(alike / (1 - alike)) * of_sets)
        low, high = change_interval(values, queries, sets).double().T.numpy()
        coverage.append(covered(low, high, 0).mean())
    fewest, mean = told(f"changes, {n_sets} sets x {size}", n_sets * size, coverage)
    assert fewest >= FEWEST and mean >= 0.93


def test_intervals_cover_where_queries_repeat_after_several_sets() -> None:
    rng = np.random.default_rng(0)
    queries, sets = torch.arange(80) % 16, (torch.arange(80) + torch.arange(80) // 80) % 10
    coverage = []
    for of_sets in (0.0, 0.5, 1.0):
        for of_queries in (0.0, 0.5, 1.0):
            effects = rng.normal(size=(4_000, 10)) * of_sets, rng.normal(size=(4_000, 16))
            values = rng.normal(size=(4_000, 80)) + effects[0][:, sets]
            values += of_queries * effects[1][:, queries]
            low, high = change_interval(torch.from_numpy(values), queries, sets).double().T.numpy()
            coverage.append(covered(low, high, 0).mean())
    fewest, mean = told("changes, 16 queries over 10 sets", 80, coverage)
    assert fewest >= FEWEST and mean >= 0.94


def test_the_design_effect_is_the_variance_between_sets() -> None:
    right, _ = after_sets(np.random.default_rng(0), 0.5, 0.3, (1, 20, 10), "beta")
    values, queries, sets = as_episodes(right.astype(float))
    n, df = effective_size(values, queries, sets)
    of_sets, p = right[0].mean(axis=1), right.mean()
    estimated = (of_sets.var(ddof=1) / 20) / (p * (1 - p) / 200)
    rare = min(right.sum(), (1 - right).sum())
    expected = (rare * estimated + 1 + 0.3 * 9) / (rare + 1)
    assert float(n) == pytest.approx(200 / expected) and df == 19 and estimated > 2
    ends = share_interval(values, queries, sets)
    z, centre = t.ppf(0.975, 19) ** 2, float(n)
    middle, half = p + z / (2 * centre), np.sqrt(z * (p * (1 - p) / centre + z / (4 * centre**2)))
    assert float(ends[0]) == pytest.approx((middle - half) / (1 + z / centre))
    assert float(ends[1]) == pytest.approx((middle + half) / (1 + z / centre))
    fresh = share_interval(values, queries)
    assert fresh[0] > ends[0] and fresh[1] < ends[1]
    changes = change_interval(values[0], queries, sets)
    assert torch.allclose(changes, mean_interval(torch.from_numpy(of_sets)), atol=1e-6)


def test_sets_of_one_query_are_nearly_fresh_and_one_set_tells_nothing() -> None:
    values, queries = (torch.arange(60) % 3 == 0).double(), torch.arange(60)
    own, fresh = share_interval(values, queries, queries), share_interval(values, queries)
    assert float(own[1] - own[0]) == pytest.approx(float(fresh[1] - fresh[0]), rel=0.03)
    one = torch.zeros(60, dtype=torch.long)
    assert [float(end) for end in share_interval(values, queries, one)] == [0, 1]
    assert change_interval(values, queries, one).isnan().all()
    n, df = effective_size(values, queries, one)
    assert df == 0 and paired_interval(values, n=float(n), df=df) == pytest.approx((-1, 1))
    for share in (0.0, 1.0):  # equal answers after all sets still give an interval a width
        low, high = share_interval(
            torch.full((40,), share), torch.arange(40), torch.arange(40) // 5
        )
        assert float(high - low) > 0.15


DISTRIBUTIONS = {
    "normal": (lambda rng, size: rng.normal(size=size), 0.0),
    "exponential": (lambda rng, size: rng.exponential(size=size), 1.0),
    "lognormal": (lambda rng, size: rng.lognormal(size=size), np.exp(0.5)),
    "long tails": (lambda rng, size: rng.standard_t(3, size), 0.0),
    "a loss": (lambda rng, size: -np.log(rng.beta(0.5, 0.5, size)), 2 * np.log(2)),
    "a change of loss": (
        lambda rng, size: rng.exponential(size=size) - 1.5 * rng.exponential(size=size),
        -0.5,
    ),
}


@pytest.mark.parametrize("n", [*SIZES, LARGE])
def test_intervals_of_means_cover_nearly_as_often_as_they_say(n: int) -> None:
    coverage = []
    for draw, truth in DISTRIBUTIONS.values():
        values = draw(np.random.default_rng(0), (10_000, n))
        low, high = mean_interval(torch.from_numpy(values)).double().T.numpy()
        coverage.append(covered(low, high, truth).mean())
    fewest, mean = told(f"means of {', '.join(DISTRIBUTIONS)}", n, coverage)
    # No interval of the mean of a few skewed values covers 0.95; percentiles cover 0.79 of n = 10.
    assert fewest >= FEWEST and mean >= 0.93


def test_holm_is_statsmodels() -> None:
    for seed in range(20):
        p = torch.rand(7, generator=torch.Generator().manual_seed(seed)) ** 3
        expected = multipletests(p.numpy(), method="holm")[1]
        np.testing.assert_allclose(holm(p).numpy(), expected, rtol=1e-6)


def test_the_maximum_of_noise_is_not_believed() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (torch.rand(50, 400, generator=generator) < 0.5).float()
    assert noise.mean(dim=1).max() > 0.54
    by_task = noise.split(100, dim=1)
    assert float(cross_fitted_best(by_task)) == pytest.approx(0.5, abs=0.04)
    noise[7] = 1.0
    assert float(cross_fitted_best(by_task)) == 1.0


def test_values_of_one_query_are_averaged_in_order_of_first_appearance() -> None:
    queries = torch.tensor([9, -4, 9, 2, -4, 9])
    values = torch.tensor([[1, 0, 1, 1, 1, 0], [0, 0, 0, 5, 1, 0]])
    found = means_by_query(values, queries)
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 0.5, 1], [0, 0.5, 5]]).double())
    distinct = torch.rand(7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(means_by_query(distinct, torch.randperm(7)), distinct.double())
