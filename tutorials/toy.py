"""The toy model under every analysis.

python tutorials/toy.py --out tutorials/figures
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.plots import FIGURE_SIZE, save_figures, styled


@styled
def over_training(run: lab.ToyRun) -> plt.Figure:
    """TD and accuracy at each evaluation of the training run, four shots."""
    figure, ax = plt.subplots(figsize=FIGURE_SIZE, layout="constrained")
    td = run.td.mean(-1).max(dim=1).values
    accuracy = run.accuracy[:, :-1, 4].mean(dim=1)
    for step, one, other in zip(run.steps, td.tolist(), accuracy.tolist(), strict=True):
        print(f"  step {step:5d}: TD {one:.2f}, accuracy {other:.2f}")
    ax.plot(run.steps, td.tolist(), "o-", label="task decodability, best layer")
    ax.plot(run.steps, accuracy.tolist(), "s-", label="accuracy, four shots")
    ax.set(xlabel="training step", ylim=(-0.03, 1.03), title="The toy model over training")
    ax.legend()
    return figure


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="tutorials/figures")
    args = parser.parse_args()
    model = tv.load_model("toy", device="cpu")
    operators, tasks = tv.bitwise_tasks(null=False), tv.bitwise_tasks()
    for shots in (0, 1, 2, 4, 8):
        scores = tv.evaluate(model, tv.sample_episodes(operators, 40, shots, seed=1))
        print(f"accuracy, {shots} shots: {scores.accuracy:.2f}")
    activations = tv.collect(model, tv.sample_episodes(operators, 100, 4, seed=2))
    decodability = tv.task_decodability(activations)
    print("TD by layer, six operators:", [round(x, 2) for x in decodability.mean.tolist()])
    print(decodability.null())
    vectors = tv.task_vectors(tv.collect(model, tv.sample_episodes(tasks, 100, 8, seed=3)))
    queries = tv.zero_shot(tv.sample_episodes(operators, 40, 8, seed=4))
    sweep = tv.layer_sweep(model, queries, vectors)
    print("injected, by layer:", [round(x, 2) for x in sweep.accuracy.mean(dim=1).tolist()])
    layer = sweep.best_layer()
    matrix = tv.perturbation_matrix(
        model, tv.sample_episodes(operators, 40, 4, seed=5), vectors, layer
    )
    own = torch.tensor([[s == t for t in matrix.targets] for s in matrix.sources])
    change = matrix.delta_accuracy
    print(
        f"perturbation, layer {layer}: accuracy {float(change[own].mean()):+.2f} with the own "
        f"vector, {float(change[~own].mean()):+.2f} with another's"
    )
    for shots in (1, 4):
        episodes = tv.sample_episodes(operators, 40, shots, seed=6)
        means = (
            tv.steering_effect(model, episodes, vectors, layer).to_frame().mean(numeric_only=True)
        )
        print(
            f"steering, {shots} shots: {means.unperturbed:.2f}, with the task's mean "
            f"{means.positive:.2f}, with Null's {means.negative:.2f}"
        )
    effects = tv.head_effects(model, tv.sample_episodes(operators, 40, 8, seed=7))
    print(effects)
    print("over training, four shots:")
    figures = {
        "toy_training": over_training(lab.shipped_toy_run()),
        "toy_layer_sweep": tv.plot_layer_sweep(sweep).figure,
        "toy_decodability": tv.plot_decodability(decodability).figure,
        "toy_perturbation": tv.plot_perturbation(matrix).figure,
        "toy_heads": tv.plot_head_effects(effects).figure,
        "toy_embedding": tv.plot_embedding(activations, layer).figure,
    }
    for path in save_figures(figures, args.out):
        print("wrote", path)


if __name__ == "__main__":
    main()
