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
# # Watch task vectors emerge
#
# A small transformer is trained on sequences `x1 y1 x2 y2 ...` of linear regression. The weights of
# every sequence are new, but they live in one of four two-dimensional *bases*, and nothing in the
# sequence says in which. A model that finds out the basis can predict much better. Does it, when, and
# where does it keep the answer?

# %%
try:
    import transformer_lens_taskvec as tv
except ImportError:  # a fresh Colab
    # %pip install -q transformer-lens-taskvec
    import transformer_lens_taskvec as tv

# %%
import dataclasses
import os
import tempfile

import matplotlib.pyplot as plt

from transformer_lens_taskvec import lab

FAST = bool(os.environ.get("TASKVEC_FAST"))
MODEL = "small"  # the preset; "paper" is the paper's model, for a GPU
STEPS = 250 if FAST else 2_000

# %% [markdown]
# ## Two minutes of training
#
# The first steps show the beginning: the model learns to regress, for all bases alike. A run is a
# folder; stopped at any moment it goes on from there.

# %%
config = dataclasses.replace(lab.PRESETS[MODEL], steps=STEPS)
run = lab.train(config, tempfile.mkdtemp(), seed=0)
run

# %%
for index, name in enumerate(run.tasks):
    plt.plot(run.steps, run.late_mse[:, index], label=name)
plt.xlabel("training step")
plt.ylabel("squared error, second half")
plt.xscale("symlog")
plt.yscale("log")
plt.legend(frameon=False);

# %% [markdown]
# ## The whole story
#
# A complete run of the preset comes with the package, as twelve checkpoints. `emergence` measures
# each: the error of every basis, task decodability (TD) at every layer, what swapping the bases'
# representations does, and the distance to predictors that know more or less than the model should.

# %%
run = lab.shipped_run()
found = lab.emergence(run, n=30 if FAST else 100)
found

# %%
tv.plot_training(found);

# %% [markdown]
# The error falls in two steps. First the model regresses without regard to the basis, and TD stays at
# chance. Then the bases come apart, one before the others, and the error falls with it: below every
# predictor that does not infer the basis, and towards the exact Bayesian one.

# %%
tv.plot_oracles(found);

# %% [markdown]
# ## Is the separation used?
#
# Decodable does not mean used. So we put the representation of one basis into sequences of another:
# the own one does no harm, another's makes the error many times larger.

# %%
tv.plot_perturbation(found.swaps[-1]);

# %% [markdown]
# ## The same functions as for a language model
#
# The lab's models have TransformerLens' hook names, so `collect`, `task_decodability`, `head_effects`
# and the plots are the ones of the other notebooks.

# %%
episodes = lab.regression_episodes(run.config.mixture, n=30 if FAST else 100, seed=1)
activations = tv.collect(run.model(), episodes)
tv.plot_embedding(activations, tv.task_decodability(activations).best_layer, method="pca");

# %% [markdown]
# How does the encoding compare with theory? The exact posterior over bases is known for every prompt.
# With few demonstrations it is undecided on some prompts; the share of nearest neighbours with the
# right basis follows it.

# %%
for n_shots in (2, 3, 4):
    print(lab.posterior_agreement(run, n_shots=n_shots, n=50 if FAST else 250))

# %% [markdown]
# ## What to try next
#
# - A mixture of your own: any frozen dataclass with `sample(n, generator)`; see
#   `04_your_own_hooks_and_tasks`.
# - Overlapping bases: `lab.SparseLinearMixture(dim, bases)`. Do the groups come apart, or their
#   members?
# - `taskvec train --preset small --out runs/mine --seed 3`: does the same basis come first?
