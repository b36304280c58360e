"""Task vectors as features of a small dictionary, on SmolLM2-135M-Instruct.

taskvec dictionary --layer 20 --out layer20.safetensors
python tutorials/features.py layer20.safetensors

Prints how well features add up to mean vectors, next to random vectors of equal norm and the mean
of the prompts' own encodings; accuracy in zero-shot prompts as the top features are kept or
dropped, next to as many active ones at random; and what sparse fine-tuning leaves of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

import transformer_lens_taskvec as tv

TASKS = ["singular_plural", "present_gerund", "upper_case", "antonyms"]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dictionary", type=Path)
    parser.add_argument("--model", default="smollm2")
    arguments = parser.parse_args()
    dictionary = tv.vectors.TopKDictionary.load(arguments.dictionary)
    layer, model = dictionary.origin.layer, tv.load_model(arguments.model)
    sizes = {"train": 25, "test": 60}
    sets = tv.sample_splits(tv.find_tasks(TASKS), sizes, n_shots=5, seed=0)
    found = tv.collect(model, sets["train"], layers=[layer])
    vectors, test = tv.task_vectors(found), tv.zero_shot(sets["test"])
    parts = tv.vectors.decompose(vectors, dictionary, layer, activations=found)
    quality = {
        name: {"error": one.error.mean(), "cosine": one.cosine.mean(), "L0": one.l0.mean()}
        for name, one in parts.reconstructions.items()
    }
    print(pd.DataFrame(quality).T.astype(float).round(2))
    for of in ("vector", "mean of encodings"):
        ks = (1, 5, 10, 20, 50, 100)
        accuracy = tv.vectors.accuracy_by_features(model, test, parts, ks=ks, of=of)
        table = (
            accuracy.to_frame()
            .groupby(["condition", "k"], dropna=False, sort=False)
            .accuracy.mean()
        )
        print(f"\naccuracy, features of the {of}\n{table.round(2).to_string()}")
    train = tv.zero_shot(sets["train"])
    clean = tv.vectors.clean_vectors(model, train, vectors, dictionary, layer)
    reconstruction = parts.reconstruct(parts.features_of("vector"))
    print("\nsparse fine-tuning")
    for task in clean.tasks:
        own = [one for one in test if one.task == task]
        edits = [one.inject(task, layer) for one in (vectors, reconstruction, clean)]
        scores = tv.evaluate_many(model, own, edits)
        before, left = clean.l0_before[task], clean.l0[task]
        shown = ", ".join(f"{one.accuracy:.2f}" for one in scores)
        print(f"{task}: {before} features become {left}; mean, reconstruction, cleaned: {shown}")


if __name__ == "__main__":
    main()
