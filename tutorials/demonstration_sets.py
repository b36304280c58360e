"""How alike the answers after the same demonstrations are, and how wide intervals so become.

python tutorials/demonstration_sets.py                    # SmolLM2-135M-Instruct, 40 sets x 10
python tutorials/demonstration_sets.py --sets 20 --model gpt2

Per task: accuracy, the correlation within sets (the analysis of variance's, with a jackknife over
sets for its standard error), and its mean over tasks. Then, by simulation at a correlation, how
much wider the interval of an accuracy is than with fresh demonstrations.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import torch

import transformer_lens_taskvec as tv
from transformer_lens_taskvec._utils.statistics import share_interval
from transformer_lens_taskvec.cli import DEMO_TASKS


def correlation(correct: np.ndarray) -> float:
    """The correlation within sets of answers ``[set, query]``; 0 if all are the same."""
    if correct.min() == correct.max():
        return 0.0
    size = correct.shape[1]
    between = size * correct.mean(axis=1).var(ddof=1)
    within = correct.var(axis=1, ddof=1).mean()
    return float((between - within) / (between + (size - 1) * within))


def with_error(correct: np.ndarray) -> tuple[float, float]:
    """The correlation within sets, and its standard error."""
    n = len(correct)
    without = [correlation(np.delete(correct, one, axis=0)) for one in range(n)]
    return correlation(correct), float(np.std(without) * np.sqrt(n - 1))


def wider(n: int, n_sets: int, alike: float, n_draws: int = 1_500) -> float:
    """The mean width of an interval over that with fresh demonstrations, over accuracies."""
    rng, queries = np.random.default_rng(0), torch.arange(n)
    sets, ratios = queries % n_sets, []
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        ends = (share, 1 - share)
        own = rng.beta(*(end * (1 / alike - 1) for end in ends), (n_draws, n_sets))
        shared = torch.from_numpy(rng.random((n_draws, n)) < own[:, sets])
        fresh = torch.from_numpy(rng.random((n_draws, n)) < share)
        widths = [
            float((high - low).mean())
            for low, high in (share_interval(shared, queries, sets), share_interval(fresh, queries))
        ]
        ratios.append(widths[0] / widths[1])
    return float(np.mean(ratios))


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sets", type=int, default=40)
    parser.add_argument("--queries", type=int, default=10, help="after each set")
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--seed", type=int, default=11)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*distinct inputs")
    model, found = tv.load_model(given.model), []
    for name, task in tv.find_tasks(DEMO_TASKS).items():
        n = given.sets * given.queries
        episodes = tv.sample_episodes([task], n, given.shots, given.seed, demo_sets=given.sets)
        scores = tv.evaluate(model, episodes)
        order = scores.demo_sets.argsort(stable=True)
        alike, error = with_error(scores.correct[order].double().numpy().reshape(given.sets, -1))
        found.append((alike, error))
        print(f"{name:16} accuracy {scores.accuracy:.2f}, correlation {alike:+.3f} +- {error:.3f}")
    mean = float(np.mean(found, axis=0)[0])
    error = float(np.linalg.norm(np.array(found)[:, 1]) / len(found))
    print(f"mean correlation {mean:.3f} +- {error:.3f}")
    for n, sizes in ((40, (8, 10, 20, 28)), (100, (10, 20, 40, 50))):
        for n_sets in sizes:
            ratios = [wider(n, n_sets, alike) for alike in (0.03, 0.06, 0.12)]
            text = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{n} queries, {n_sets} sets: {text} times as wide at 0.03, 0.06, 0.12")


if __name__ == "__main__":
    main()
