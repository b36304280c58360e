from __future__ import annotations

from functools import partial
from typing import Any

import architectures
import pytest
import torch
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec._utils.statistics import mean_interval
from transformer_lens_taskvec.prompts import shuffle_labels

pytestmark = pytest.mark.filterwarnings("ignore:.*one intervention at a time")


@pytest.fixture(scope="module")
def few_shot() -> list[tv.Episode]:
    return tv.sample_episodes(tv.find_tasks(["singular_plural", "en_fr"]), n=4, n_shots=3, seed=0)


def answer_nll(model: Any, episode: tv.Episode, hooks: list[Any]) -> float:
    """One unpadded run by hand."""
    encode = model.tokenizer.encode
    prompt = encode(episode.prompt, add_special_tokens=False)
    answer = encode(episode.answer, add_special_tokens=False)
    at = len(prompt) - 1
    with torch.no_grad():
        logits = model.run_with_hooks(
            torch.tensor([prompt + answer]), fwd_hooks=[(name, f(at)) for name, f in hooks]
        )
    logp = logits[0, at:-1].log_softmax(-1)
    return -float(logp[range(len(answer)), answer].sum())


def put(value: torch.Tensor, head: int) -> Any:
    def at(position: int) -> Any:
        def edit(z: torch.Tensor, hook: Any) -> torch.Tensor:
            edited = z.clone()
            edited[:, position, head] = value
            return edited

        return edit

    return at


@pytest.mark.model
def test_an_effect_is_what_a_heads_mean_does_in_shuffled_prompts_one_run_each(
    model: Any, few_shot: list[tv.Episode]
) -> None:
    effects = tv.head_effects(model, few_shot, seed=3)
    assert effects.probability.shape == effects.log_probability.shape == (3, 4)
    clean = [e for task in effects.tasks for e in few_shot if e.task == task]
    for index, task in enumerate(effects.tasks):
        own = [episode for episode in clean if episode.task == task]
        caches = []
        for episode in own[:2]:
            tokens = model.tokenizer.encode(episode.prompt, add_special_tokens=False)
            with torch.no_grad():
                caches.append(model.run_with_cache(torch.tensor([tokens]))[1])
        corrupted = [
            e for e in shuffle_labels([*clean[2:4], *clean[6:8]], seed=3) if e.task == task
        ]
        for layer, head in ((0, 1), (2, 3)):
            name = f"blocks.{layer}.attn.hook_z"
            mean = torch.stack([cache[name][0, -1, head] for cache in caches]).mean(dim=0)
            torch.testing.assert_close(
                effects.means[index, layer, head], mean, atol=1e-5, rtol=1e-4
            )
            log_change, change = 0.0, 0.0
            for episode in corrupted:
                before = answer_nll(model, episode, [])
                after = answer_nll(model, episode, [(name, put(mean, head))])
                log_change += (before - after) / 2
                change += float(torch.tensor(-after).exp() - torch.tensor(-before).exp()) / 2
            found = effects.by_task["log_probability"][index, layer, head]
            assert float(found) == pytest.approx(log_change, abs=2e-4)
            found = effects.by_task["probability"][index, layer, head]
            assert float(found) == pytest.approx(change, abs=1e-6)


@pytest.mark.model
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_pruning_takes_a_head_out_of_clean_prompts(
    model: Any, few_shot: list[tv.Episode], ablation: str
) -> None:
    effects = tv.head_effects(model, few_shot, on=few_shot, ablation=ablation)
    z = tv.collect(model, few_shot, hook="z").values
    for layer, head in ((1, 0), (2, 2)):
        value = torch.zeros(8) if ablation == "zero" else z[:, layer, head].mean(dim=0)
        for index, task in enumerate(effects.tasks):
            own = [episode for episode in few_shot if episode.task == task]
            change = 0.0
            for episode in own:
                hook = (f"blocks.{layer}.attn.hook_z", put(value, head))
                change += answer_nll(model, episode, []) - answer_nll(model, episode, [hook])
            found = effects.by_task["log_probability"][index, layer, head]
            assert float(found) == pytest.approx(change / len(own), abs=2e-4)


@pytest.mark.model
def test_a_function_vector_of_all_heads_is_the_mean_attention_output(
    model: Any, few_shot: list[tv.Episode]
) -> None:
    effects = tv.head_effects(model, few_shot, on=few_shot)
    vectors = tv.function_vectors(model, few_shot, n_heads=12, effects=effects)
    assert sorted(vectors.source.heads) == [
        (layer, head) for layer in range(3) for head in range(4)
    ]
    outputs = tv.task_vectors(tv.collect(model, few_shot, hook="attn_out"))
    for task in vectors.tasks:
        torch.testing.assert_close(vectors[task, 0], outputs[task].sum(dim=0), atol=1e-4, rtol=1e-4)


@pytest.mark.model
def test_effects_read_the_clean_prompts_once(
    model: Any, few_shot: list[tv.Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    run = model.run_with_hooks

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("pass")
        return run(*args, **kwargs)

    tv.head_effects(model, few_shot, on=few_shot)  # what the model can do is remembered
    monkeypatch.setattr(model, "run_with_hooks", counted)
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    edits = [[tv.inject(torch.ones(8), i, hook="z", head=head)] for i, head in heads]
    tv.evaluate_many(model, shuffle_labels(few_shot, 0), lambda task: [[], *edits])
    measuring = len(calls)
    calls.clear()
    tv.head_effects(model, few_shot, on=few_shot)
    assert len(calls) == measuring + 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt"])
def test_heads_write_through_their_part_of_w_o_in_every_architecture(
    kind: str, tokenizer: Any, few_shot: list[tv.Episode]
) -> None:
    model = zoo.bridge(kind, tokenizer)
    z = tv.collect(model, few_shot, hook="z").values
    out = tv.collect(model, few_shot, hook="attn_out").values
    bias = out.new_zeros(3, 32)
    for layer in range(3):
        b_O = getattr(model.blocks[layer].attn, "b_O", None)
        bias[layer] = 0 if b_O is None else b_O.detach()
    weights = torch.stack([model.blocks[layer].attn.W_O.detach() for layer in range(3)])
    summed = torch.einsum("elhd,lhdm->elm", z, weights) + bias
    torch.testing.assert_close(summed, out, atol=1e-4, rtol=1e-4)


# By model: the projection of the heads' outputs, and the module that reads the residual stream
# after attention, or None where attention and MLP run in parallel and attention's output is added.
PARTS = {
    "llama": ("self_attn.o_proj", "post_attention_layernorm"),
    "gpt2": ("attn.c_proj", "ln_2"),
    "gemma2": ("self_attn.o_proj", "pre_feedforward_layernorm"),
    "gemma3_text": ("self_attn.o_proj", "pre_feedforward_layernorm"),
    "olmo2": ("self_attn.o_proj", "mlp"),
    "granite, multipliers": ("self_attn.o_proj", "post_attention_layernorm"),
    "deepseek_v3": ("self_attn.o_proj", "post_attention_layernorm"),
    "bloom": ("self_attention.dense", "post_attention_layernorm"),
    "gpt_neox": ("attention.dense", None),
    "gptj": ("attn.out_proj", None),
    "cohere": ("self_attn.o_proj", None),
}


class Plain:
    """A model of ``transformers`` whose heads are read and edited by torch hooks."""

    def __init__(self, name: str) -> None:
        self.model = architectures.hf_model(*architectures.rows()[name])
        self.blocks = architectures.blocks_of(self.model)
        self.projection, self.after = PARTS[name]

    def run(
        self, episode: tv.Episode, edit: tuple[int, int, torch.Tensor] | None = None
    ) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The answer's log-probability; of each layer z, its projection and what was added."""
        prompt, answer = (
            [int(word[1:-1]) for word in text.split()] for text in (episode.prompt, episode.answer)
        )
        at, kept = len(prompt) - 1, {name: [] for name in ("z", "projected", "before", "after")}

        def project(layer: int, module: Any, args: Any) -> Any:
            z = args[0].clone()
            if edit is not None and edit[0] == layer:
                z.unflatten(-1, (4, -1))[0, at, edit[1]] = edit[2]
            kept["z"].append(z[0, at].unflatten(-1, (4, -1)))
            return (z, *args[1:])

        def projected(module: Any, args: Any, output: Any) -> None:
            kept["projected"].append(output[0, at])

        def stream(name: str, module: Any, args: Any, kwargs: Any) -> None:
            kept[name].append((args[0] if args else kwargs["hidden_states"])[0, at])

        handles = []
        for layer, block in enumerate(self.blocks):
            projection = block.get_submodule(self.projection)
            handles.append(projection.register_forward_pre_hook(partial(project, layer)))
            handles.append(projection.register_forward_hook(projected))
            for name, module in (("before", block), ("after", self.after)):
                if isinstance(module, str):
                    module = block.get_submodule(module)
                if module is not None:
                    hook = partial(stream, name)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        logp = logits[at:-1].log_softmax(-1)[range(len(answer)), answer].sum()
        z, projected_, before, *after = (torch.stack(kept[name]) for name in kept if kept[name])
        return float(logp), z, projected_, after[0] - before if after else projected_

    def added(self, episode: tv.Episode) -> torch.Tensor:
        """What each head adds to the residual stream, ``[layer, head, d_model]``."""
        _, z, projected, total = self.run(episode)
        parts = []
        for layer, block in enumerate(self.blocks):
            weight = block.get_submodule(self.projection).weight
            weight = weight if self.projection == "attn.c_proj" else weight.T  # GPT-2's Conv1D
            bias = block.get_submodule(self.projection).bias
            share = torch.einsum("hd,hdm->hm", z[layer], weight.unflatten(0, (4, -1)))
            # Multiplied by what a norm or a multiplier makes of the sum.
            factor = total[layer] / projected[layer]
            parts.append(share * factor)
            whole = parts[-1].sum(0) + (0 if bias is None else bias * factor)
            torch.testing.assert_close(whole, total[layer], atol=1e-4, rtol=1e-3)
        return torch.stack(parts).detach()


def in_numbers(shots: int = 3, n: int = 4) -> list[tv.Episode]:
    """Episodes of two tasks in the words of the small models."""
    words = iter(
        torch.randint(3, 512, (1000,), generator=torch.Generator().manual_seed(5)).tolist()
    )
    template = tv.PromptTemplate("{x} {y}", bos=False)

    def example(answer: str) -> tv.Example:
        return tv.Example(f"<{next(words)}> <{next(words)}>", answer)

    return [
        tv.Episode(
            task,
            tuple(example(f"<{20 + 7 * shot}>") for shot in range(shots + index % 2)),
            example(f"<{next(words)}>"),
            template,
        )
        for task in ("a", "b")
        for index in range(n)
    ]


def bridged(name: str) -> Any:
    hf_model = architectures.hf_model(*architectures.rows()[name])
    return tv.bridge_from_hf(hf_model, architectures.tokenizer(), device="cpu")


@pytest.mark.parametrize("name", PARTS)
def test_a_function_vector_is_what_its_heads_add_to_the_residual_stream(name: str) -> None:
    plain, model, episodes = Plain(name), bridged(name), in_numbers()
    added = torch.stack([plain.added(episode) for episode in episodes])
    effects = tv.head_effects(model, episodes, on=episodes)
    for n_heads in (3, 16):
        vectors = tv.function_vectors(model, episodes, n_heads, effects=effects)
        for index, task in enumerate(vectors.tasks):
            own = added[4 * index : 4 * index + 4].mean(dim=0)
            wanted = sum(own[place] for place in vectors.source.heads)
            torch.testing.assert_close(vectors[task, 0], wanted, atol=1e-4, rtol=1e-3)
    question = architectures.questions()[1]
    tokens = torch.tensor([question.prompt + question.answer])
    edit, at = ("add", 1, vectors["b", 1]), len(question.prompt) - 1
    with torch.no_grad():
        logits, _ = architectures.run_plain(plain.model, tokens, edit, at)
    logp = logits[0, at:-1].log_softmax(-1)[range(len(question.answer)), question.answer].sum()
    found = tv.evaluate(model, [question.episode()], vectors.inject("b", 1))
    assert float(found.loss) == pytest.approx(-float(logp), abs=1e-3)


@pytest.mark.parametrize("name", PARTS)
def test_head_effects_are_those_of_the_plain_model(name: str) -> None:
    plain, model, episodes = Plain(name), bridged(name), in_numbers()
    effects = tv.head_effects(model, episodes, seed=3)
    clean = [*episodes[:2], *episodes[4:6]]
    shuffled = shuffle_labels([*episodes[2:4], *episodes[6:8]], seed=3)
    for index in range(2):
        z = torch.stack([plain.run(episode)[1] for episode in clean[2 * index : 2 * index + 2]])
        for layer, head in ((0, 1), (2, 3)):
            mean = z.mean(dim=0)[layer, head]
            changes = [
                plain.run(episode, (layer, head, mean))[0] - plain.run(episode)[0]
                for episode in shuffled[2 * index : 2 * index + 2]
            ]
            found = effects.by_task["log_probability"][index, layer, head]
            assert float(found) == pytest.approx(sum(changes) / 2, abs=1e-3)


def test_there_are_no_function_vectors_where_attention_is_not_the_sum_of_its_heads() -> None:
    # Falcon H1 adds a state space's output together with attention's.
    model, episodes = bridged("falcon_h1"), in_numbers()
    effects = tv.head_effects(model, episodes)
    with pytest.raises(ValueError, match="FalconH1ForCausalLM is not the sum of its heads"):
        tv.function_vectors(model, episodes, 3, effects=effects)


def test_the_top_heads_have_the_largest_effects(model: Any, few_shot: list[tv.Episode]) -> None:
    effects = tv.head_effects(model, few_shot)
    top = effects.top(5)
    values = [float(effects.probability[place]) for place in top]
    assert values == sorted(values, reverse=True)
    assert values[-1] >= float(effects.probability.flatten().sort(descending=True).values[4])
    vectors = tv.function_vectors(model, few_shot, n_heads=5, effects=effects)
    assert vectors.source.heads == top
    assert len(effects.to_frame()) == 2 * 12
    with pytest.raises(ValueError, match="13 heads are asked for; the model has 12"):
        effects.top(13)


def test_of_ablated_heads_those_that_are_missed_most_come_first(
    model: Any, few_shot: list[tv.Episode]
) -> None:
    pruned = tv.head_effects(model, few_shot, on=few_shot, ablation="zero")
    layer, head = pruned.top(1)[0]
    assert float(pruned.probability[layer, head]) == float(pruned.probability.min())
    with pytest.raises(ValueError, match="effects of zero ablation"):
        tv.function_vectors(model, few_shot, 2, effects=pruned)


def test_intervals_of_head_effects_are_those_of_the_mean_over_queries(
    model: Any, few_shot: list[tv.Episode]
) -> None:
    pruned = tv.head_effects(model, few_shot, on=few_shot, ablation="zero")
    frame = pruned.to_frame()
    assert (frame.low <= frame.log_probability + 1e-6).all()
    assert (frame.log_probability <= frame.high + 1e-6).all()
    row = frame.iloc[5]
    own = [episode for episode in few_shot if episode.task == row.task]
    edit = tv.ablate(row.layer, hook="z", head=int(row["head"]))
    before, after = tv.evaluate_many(model, own, [[], [edit]])
    change = (before.loss - after.loss).double()
    low, high = mean_interval(change).tolist()
    assert (row.low, row.high) == pytest.approx((low, high), abs=1e-3 * (high - low) + 1e-4)
    assert row.n == row.n_distinct == 4
    again = tv.head_effects(model, few_shot, on=[*few_shot, *few_shot[:2]], ablation="zero")
    twice = again.to_frame().iloc[5]
    assert (twice.low, twice.high) == pytest.approx((row.low, row.high), abs=1e-4)
    assert (twice.n, twice.n_distinct) == (6, 4)


def test_every_task_that_is_measured_has_clean_episodes(
    model: Any, few_shot: list[tv.Episode]
) -> None:
    first = [episode for episode in few_shot if episode.task == few_shot[0].task]
    for ablation in (None, "zero"):
        with pytest.raises(ValueError, match="no clean episodes for"):
            tv.head_effects(model, first, on=few_shot, ablation=ablation)


def test_no_query_is_both_in_the_means_and_in_the_measurement(model: Any) -> None:
    pairs = {letter: letter.upper() for letter in "abcd"}
    with pytest.warns(UserWarning, match="distinct inputs"):
        episodes = tv.sample_episodes([tv.mapping_task("upper", pairs)], n=10, n_shots=2, seed=0)
    effects = tv.head_effects(model, episodes)
    measured = set(effects.baseline.queries.tolist())
    early = [episode for episode in episodes if episode.query_id not in measured]
    assert effects.baseline.n_distinct == 2 and len(effects.baseline) + len(early) == 10
    means = tv.collect(model, early, hook="z").values.mean(dim=0)
    torch.testing.assert_close(effects.means[0], means, atol=1e-5, rtol=1e-4)


def test_shuffled_labels_are_the_same_labels_in_other_places(few_shot: list[tv.Episode]) -> None:
    for before, after in zip(few_shot, shuffle_labels(few_shot, seed=0), strict=True):
        assert [d.x for d in after.demos] == [d.x for d in before.demos]
        assert sorted(d.y for d in after.demos) == sorted(d.y for d in before.demos)
        assert all(a.y != b.y for a, b in zip(after.demos, before.demos, strict=True))
        assert after.query == before.query


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ablation": "noise"}, "ablation is 'noise'"),
        ({"episodes": 1}, "has one distinct query"),
        ({"shots": 1}, "has 1 demonstration"),
    ],
)
def test_what_cannot_be_measured_is_refused(model: Any, change: dict, message: str) -> None:
    tasks = tv.find_tasks(["singular_plural"])
    n, shots = change.pop("episodes", 4), change.pop("shots", 2)
    episodes = tv.sample_episodes(tasks, n=n, n_shots=shots, seed=0)
    with pytest.raises(ValueError, match=message):
        tv.head_effects(model, episodes, **change)
