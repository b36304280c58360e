"""Progressive in-context learning on answers of several tokens: accuracy and tokens by ``k``.

python tutorials/progressive.py                  # SmolLM2-135M-Instruct, about ten minutes
python tutorials/progressive.py --model gpt2 --out progressive

The first ``k`` tokens are generated after demonstrations, and the rest without them (Liu et al.
2024), with a task's mean vector, with a learned one, with a random direction as long as the mean
vector, and with nothing. Layers are chosen by the loss on dev queries. Besides mappings there is a
task made of a template: a sentence of some twelve tokens about a plural.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.plots import figure_of, save_figures

SHOWN = ["variant", "k", "accuracy", "few_shot", "difference", "difference_low", "difference_high"]


def sentences() -> tv.Task:
    """Return the task of a longer answer: a sentence about a noun and its plural."""
    [task] = tv.find_tasks(["singular_plural"]).values()
    said = {
        pair.x: f"The plural of {pair.x} is {pair.y} and there are many {pair.y}."
        for pair in task.pairs
    }
    return tv.mapping_task("plural_sentence", said)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path("progressive"))
    parser.add_argument("--n", type=int, default=60, help="test queries per task")
    arguments = parser.parse_args()
    model = tv.load_model(arguments.model)
    n_layers = int(model.cfg.n_layers)
    layers = list(range(n_layers // 5, n_layers, max(1, n_layers // 8)))
    tasks = [*tv.find_tasks(["snake_camel", "es_en", "en_fr"]).values(), sentences()]
    sizes = {"train": 20, "dev": 10, "test": arguments.n}
    for task in tasks:
        sets = tv.sample_splits([task], sizes, n_shots=5, seed=0)
        means = tv.task_vectors(tv.collect(model, sets["train"], layers=layers))
        learned = tv.vectors.learn_vectors(
            model, tv.zero_shot(sets["train"]), layers=layers, start=means
        )
        places = {}
        for name, vectors in {"mean": means, "learned": learned}.items():
            sweep = tv.layer_sweep(model, tv.zero_shot(sets["dev"]), vectors)
            places[name] = layers[int(sweep.mean_loss[:, 0].argmin())]
        edits = learned.inject(task.name, places["learned"])
        found = tv.analysis.progressive_icl(
            model,
            sets["test"],
            {"learned vector": edits},
            vectors=means,
            layer=places["mean"],
            controls=tv.control_vectors(means, kinds=["random"]),
        )
        frame = found.to_frame()
        print(f"\n{task.name}: layers {places}, answers of {float(frame.length[0]):.1f} tokens")
        print(frame[[*SHOWN, "kept", "tokens_ratio", "n_distinct"]].round(2).to_string(index=False))
        print(found.first_kept().round(2).to_string(index=False))
        figures = {f"progressive_{task.name}": figure_of(tv.plot_progressive(found))}
        for path in save_figures(figures, arguments.out):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
