"""Which tasks separate and which do not: overlapping bases, and families that share their heads.

python tutorials/lab_variants.py small --out runs/small
python tutorials/lab_variants.py overlapping --layers 4 --steps 15000 --out runs/overlapping
python tutorials/lab_variants.py families --layers 4 --steps 15000 --out runs/families

Each trains the small model on a problem (ten to twenty minutes on two cores; run it again to resume
an interrupted training), prints the results, and draws the figures of `taskvec emergence`.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.plots import save_figures


def ring(first: int) -> tuple[tuple[int, ...], ...]:
    """Four bases of rank 2 in four dimensions; each shares a coordinate with the next."""
    return tuple(tuple(sorted((first + k, first + (k + 1) % 4))) for k in range(4))


PROBLEMS: dict[str, lab.Problem] = {
    "small": lab.SparseLinearMixture.small(),
    "overlapping": lab.SparseLinearMixture(8, ring(0) + ring(4), n_points=16),
    "families": lab.RegressionFamilies(dim=8, n_points=16),
}


def by_group(activations: tv.Activations) -> tv.Activations:
    """The same points, labelled by the half of the bases that holds their basis."""
    half = len(activations.tasks) // 2
    return dataclasses.replace(
        activations, labels=(activations.labels >= half).long(), tasks=("first", "second")
    )


def of_group(activations: tv.Activations, group: int) -> tv.Activations:
    """The points of one group, each with its own basis as label."""
    half = len(activations.tasks) // 2
    chosen = (activations.labels >= half) == bool(group)
    return dataclasses.replace(
        activations,
        values=activations.values[chosen],
        labels=activations.labels[chosen] - half * group,
        tasks=activations.tasks[half * group : half * (group + 1)],
    )


def main() -> None:
    """Train, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem", choices=PROBLEMS)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="in place of the preset's")
    parser.add_argument("--layers", type=int, help="in place of the preset's")
    args = parser.parse_args()
    problem = PROBLEMS[args.problem]
    config = dataclasses.replace(lab.PRESETS["small"], problem=problem)
    if args.steps:
        config = dataclasses.replace(config, steps=args.steps)
    if args.layers:
        config = dataclasses.replace(config, n_layers=args.layers)
    run = lab.train(config, args.out, seed=args.seed, device="cpu")
    print(run)
    model, episodes = run.model(), lab.problem_episodes(problem, 100, seed=5)
    activations = tv.collect(model, episodes)
    print(tv.task_decodability(activations))
    if args.problem == "overlapping":
        print("between groups:", tv.task_decodability(by_group(activations)))
        for group in (0, 1):
            print("within group:", tv.task_decodability(of_group(activations, group)))
    pruned = tv.head_effects(model, episodes, on=episodes, ablation="zero", position=None)
    harm = -pruned.gain
    before = torch.tensor([pruned.baseline.of(task).mean_loss for task in pruned.tasks])
    relative = harm / before[:, None, None]
    print("change in squared error without a head, over the error with it:")
    for layer in range(harm.shape[1]):
        for head in range(harm.shape[2]):
            row = relative[:, layer, head]
            most, least = float(row.max()), float(row.clamp(min=0.01).min())
            cells = " ".join(
                f"{task} {float(value):8.2f}" for task, value in zip(pruned.tasks, row, strict=True)
            )
            print(f"  {layer}.{head}: {cells}   most/least {most / least:.1f}")
    found = lab.measure_emergence(run)
    print(found)
    figures = lab.emergence_figures(run, found)
    for path in [found.save(args.out), *save_figures(figures, args.out)]:
        print("wrote", path)


if __name__ == "__main__":
    main()
