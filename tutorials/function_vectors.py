"""Function vectors of SmolLM2-135M: zero-shot accuracy before and after one is added.

    python tutorials/function_vectors.py

The heads are chosen by their effect over all the tasks; the layer of injection on dev queries; the
accuracies are those of test queries (Todd et al. 2023).
"""

import pandas as pd

import transformer_lens_taskvec as tv

TASKS = [
    "antonyms",
    "present_past",
    "singular_plural",
    "present_gerund",
    "next_letter",
    "capitalize",
]
N_SHOTS, N_HEADS, SCALES = 8, 20, (1.0, 2.0)

model = tv.load_model("smollm2")
sets = tv.sample_splits(
    tv.find_tasks(TASKS), {"clean": 16, "dev": 20, "test": 40}, n_shots=N_SHOTS, seed=0
)
vector = tv.function_vector(model, sets["clean"], n_heads=N_HEADS, progress=True)
print(vector.effects)
print(vector)

places = [(layer, scale) for layer in range(5, 25) for scale in SCALES]
rows = []
for task in TASKS:
    variants = [
        [tv.inject(vector[task], layer, mode="add", scale=scale)] for layer, scale in places
    ]
    dev = [episode for episode in tv.zero_shot(sets["dev"]) if episode.task == task]
    scores = tv.evaluate_many(model, dev, variants)
    best = max(range(len(places)), key=lambda i: (scores[i].accuracy, -scores[i].mean_nll))
    few_shot = [episode for episode in sets["test"] if episode.task == task]
    before, after = tv.evaluate_many(model, tv.zero_shot(few_shot), [[], variants[best]])
    rows.append(
        {
            "task": task,
            "zero-shot": before.accuracy,
            "function vector": after.accuracy,
            f"{N_SHOTS}-shot": tv.evaluate(model, few_shot).accuracy,
            "layer": places[best][0],
            "scale": places[best][1],
        }
    )
print(pd.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format))
