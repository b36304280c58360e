from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from statsmodels.stats.multitest import multipletests

from transformer_lens_taskvec._utils.statistics import bootstrap_interval, cross_fitted_best, holm


def test_the_bootstrap_is_scipys() -> None:
    values = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    ours = bootstrap_interval(values, n_resamples=20_000)
    for row in range(3):
        theirs = bootstrap(
            (values[row].numpy(),), np.mean, method="percentile", n_resamples=20_000, rng=0
        ).confidence_interval
        assert ours[row].tolist() == pytest.approx([theirs.low, theirs.high], abs=0.004)
    assert torch.equal(bootstrap_interval(torch.ones(2, 9)), torch.ones(2, 2))


def test_holm_is_statsmodels() -> None:
    for seed in range(20):
        p = torch.rand(7, generator=torch.Generator().manual_seed(seed)) ** 3
        expected = multipletests(p.numpy(), method="holm")[1]
        np.testing.assert_allclose(holm(p).numpy(), expected, rtol=1e-6)


def test_the_maximum_of_noise_is_not_believed() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    noise = (torch.rand(50, 400, generator=generator) < 0.5).float()
    assert noise.mean(dim=1).max() > 0.54
    assert float(cross_fitted_best(noise, labels)) == pytest.approx(0.5, abs=0.04)
    noise[7] = 1.0
    assert float(cross_fitted_best(noise, labels)) == 1.0
