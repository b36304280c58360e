"""How many pairs a learned vector needs before it stops learning them by heart.

python tutorials/learned_pairs.py                  # antonyms in SmolLM2-135M-Instruct, 4 minutes
python tutorials/learned_pairs.py --task en_fr --layers 7,15

Accuracy in zero-shot prompts of 40 pairs that it was trained on, and of 100 others, by layer.
"""

from __future__ import annotations

import argparse

import transformer_lens_taskvec as tv

SETTINGS = ((25, 40), (25, 15), (150, 40), (150, 90))


def main() -> None:
    """Train, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task", default="antonyms")
    parser.add_argument("--layers", default="7,11,15")
    arguments = parser.parse_args()
    model = tv.load_model(arguments.model)
    layers = [int(layer) for layer in arguments.layers.split(",")]
    sizes = {"train": 150, "dev": 20, "test": 100}
    sets = tv.sample_splits(tv.find_tasks([arguments.task]), sizes, n_shots=5, seed=0)
    means = tv.task_vectors(tv.collect(model, sets["train"][:25], layers=layers))
    for n, steps in SETTINGS:
        train = tv.zero_shot(sets["train"][:n])
        vectors = tv.vectors.learn_vectors(model, train, layers=layers, start=means, steps=steps)
        seen, new = (
            tv.layer_sweep(model, some, vectors).accuracy[:, 0].tolist()
            for some in (train[:40], tv.zero_shot(sets["test"]))
        )
        print(f"{n} pairs, {steps} steps, layers {layers}:")
        print(
            f"  trained on {[round(one, 2) for one in seen]}, new {[round(one, 2) for one in new]}"
        )


if __name__ == "__main__":
    main()
