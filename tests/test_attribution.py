"""Which part of the prompt wrote what heads add: on planted truth and against other sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import architectures
import matplotlib.pyplot as plt
import planted
import pytest
import torch
import zoo
from planted import READER, TEMPLATE, WRITER

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.analysis.attribution import attribute_demonstrations
from transformer_lens_taskvec.plots.attribution import plot_attribution
from transformer_lens_taskvec.vectors.split import parts_of_tokens


@pytest.fixture(scope="module")
def few_shot() -> list[tv.Episode]:
    """Prompts of several lengths, behind an instruction."""
    episodes = tv.sample_episodes(
        tv.find_tasks(["singular_plural", "en_fr"]), n=3, n_shots=3, seed=0
    )
    return tv.with_instructions(episodes, {"singular_plural": "Plurals", "en_fr": "To French"})


@pytest.mark.model
def test_every_token_belongs_to_the_example_that_is_written_there(
    model: Any, few_shot: list[tv.Episode]
) -> None:
    for bos in (False, True):
        some = zoo.with_bos(few_shot, bos)
        for episode, inside in zip(some, parts_of_tokens(model, some), strict=True):
            owners = inside.argmax(dim=1).tolist()
            assert inside.sum(dim=1).eq(1).all() and owners == sorted(owners)
            ids = model.tokenizer(episode.prompt, add_special_tokens=False)["input_ids"]
            assert owners[0] == 0 and len(owners) == len(ids) + bos
            own = [
                model.tokenizer.decode(
                    [i for i, o in zip(ids, owners[bos:], strict=True) if o == p]
                )
                for p in range(5)
            ]
            wanted = [f"example:{demo.x}->{demo.y}\n" for demo in episode.demos]
            instruction = f"{episode.template.instruction}\n"
            assert own == [instruction, *wanted, f"example:{episode.query.x}->"]


def test_the_parts_of_a_chat_are_its_turns(model: Any) -> None:
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    jinja = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    template = tv.PromptTemplate.chat(model.tokenizer, chat_template=jinja)
    demos = (tv.Example("cat", "cats"), tv.Example("cow", "cows"))
    for instruction, first in ((None, ""), ("Plural", "<user>Plural\n\n")):
        episode = tv.Episode("t", demos, tv.Example("dog", "dogs"), template)
        episode = replace(episode, template=replace(template, instruction=instruction))
        begins = (0, *episode.examples_begin, len(episode.prompt))
        texts = [episode.prompt[a:b] for a, b in zip(begins, begins[1:], strict=False)]
        opening = "" if instruction else "<user>"
        assert texts == [
            first,
            f"{opening}cat\n<assistant>cats\n",
            "<user>cow\n<assistant>cows\n",
            "<user>dog\n<assistant>",
        ]


@pytest.mark.model
def test_a_merged_token_goes_with_its_last_character(model: Any) -> None:
    template = tv.PromptTemplate("{x} is {y}", separator=" ")
    episode = tv.Episode("t", (tv.Example("one", "two"),), tv.Example("three", "four"), template)
    assert episode.examples_begin == (0, 11)  # behind the space that " three" begins with
    tokens = model.tokenizer(episode.prompt, add_special_tokens=False)["input_ids"]
    owners = parts_of_tokens(model, [episode])[0].argmax(dim=1).tolist()
    said = [model.tokenizer.decode([one]) for one in tokens]
    assert " three" in said and owners[said.index(" three")] == 2
    assert owners[said.index(" two")] == 1


def last_cached(model: Any, episode: tv.Episode, names: list[str]) -> dict[str, torch.Tensor]:
    ids = model.tokenizer(episode.prompt, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([ids]))
    return {name: cache[name][0] for name in names}


@pytest.mark.model
def test_the_parts_and_the_bias_sum_to_what_attention_adds(
    model: Any, few_shot: list[tv.Episode]
) -> None:
    own = [replace(episode, task=str(row)) for row, episode in enumerate(few_shot)]
    found = attribute_demonstrations(model, own, 2, batch_size=4)  # several batches, padded
    names = [f"blocks.{layer}.hook_attn_out" for layer in range(3)]
    for row, episode in enumerate(own):
        cached = last_cached(model, episode, names)
        for layer, name in enumerate(names):
            total = found.written[row, layer].sum(dim=0) + found.bias[row, layer]
            error = (total - cached[name][-1]).norm() / cached[name][-1].norm()
            assert float(error) < 1e-6 * 5
    torch.testing.assert_close(found.by_head.sum(dim=(1, 2)), torch.ones(6, dtype=torch.float64))


@pytest.mark.model
def test_a_part_is_pattern_times_value_through_the_heads_own_weights(
    model: Any, few_shot: list[tv.Episode]
) -> None:
    """Four query heads over two of keys and values, one sum at a time."""
    found = attribute_demonstrations(model, few_shot, heads=[(2, 3), (1, 0)], centred=True)
    assert found.heads == ((1, 0), (2, 3))
    rows = parts_of_tokens(model, few_shot)
    sums = torch.zeros(6, 2, 5, 32, dtype=torch.float64)
    for row, episode in enumerate(few_shot):
        names = [
            f"blocks.{layer}.attn.hook_{kind}" for layer in (1, 2) for kind in ("pattern", "v")
        ]
        cached = last_cached(model, episode, names)
        for place, (layer, head) in enumerate(found.heads):
            pattern = cached[f"blocks.{layer}.attn.hook_pattern"][head, -1].double()
            values = cached[f"blocks.{layer}.attn.hook_v"].double()
            assert values.shape[1] == 2
            weights = model.blocks[layer].attn.W_O[head].detach().double()
            for at, owner in enumerate(rows[row].argmax(dim=1).tolist()):
                share = pattern[at] * values[at, head // 2]
                sums[row, place, owner] += share @ weights
            mass = torch.stack([pattern[rows[row][:, part].bool()].sum() for part in range(5)])
            torch.testing.assert_close(found.attention[row, place], mass.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.norms, sums.norm(dim=-1).float(), atol=1e-5, rtol=1e-4)
    total = sums.sum(dim=(1, 2))
    means = torch.stack([total[:3].mean(dim=0), total[3:].mean(dim=0)])
    directions = torch.nn.functional.normalize(means - means.mean(dim=0), dim=-1)
    torch.testing.assert_close(found.directions, directions.float(), atol=1e-5, rtol=1e-4)
    # What tells the tasks apart: parts minus their means over tasks, along the difference.
    by_task = torch.stack([sums[:3].mean(dim=0), sums[3:].mean(dim=0)])
    apart = torch.einsum("thpd,td->thp", by_task - by_task.mean(dim=0), directions)
    wanted = apart / apart.sum(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(found.by_head, wanted, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.shares, wanted.sum(dim=1), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "olmo2", "granite, multipliers", "gpt2"])
def test_the_parts_sum_where_a_norm_a_multiplier_or_a_bias_follows(name: str) -> None:
    hf_model = architectures.hf_model(*architectures.rows()[name])
    model = tv.bridge_from_hf(hf_model, architectures.tokenizer(), device="cpu")
    template = tv.PromptTemplate("{x} {y}", bos=False)
    demos = tuple(tv.Example(f"<{10 + i}> <{20 + i}>", f"<{30 + i}>") for i in range(3))
    episodes = [
        tv.Episode(str(row), demos, tv.Example(f"<{40 + row}>", "<5>"), template)
        for row in range(4)
    ]
    found = attribute_demonstrations(model, episodes, 2)
    out = tv.collect(model, episodes, hook="attn_out", layers=range(3)).values
    mid = tv.collect(model, episodes, hook="resid_mid", layers=range(3)).values
    before = tv.collect(model, episodes, hook="resid_pre", layers=range(3)).values
    total = found.written.sum(dim=2) + found.bias
    for wanted in (out, mid - before):
        assert float((total - wanted).norm() / wanted.norm()) < 1e-6
    assert (float(found.bias.norm()) > 0) == (name == "gpt2")
    assert found.projections[..., 1:].abs().min() > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("afmoe", "heads' outputs differ"),  # a gate after the values
        ("falcon_h1", "is not the sum of its heads"),
        ("deepseek_v3", "no position as its second axis"),
    ],
)
def test_attention_that_cannot_be_split_is_refused(name: str, message: str) -> None:
    hf_model = architectures.hf_model(*architectures.rows()[name])
    model = tv.bridge_from_hf(hf_model, architectures.tokenizer(), device="cpu")
    template = tv.PromptTemplate("{x} {y}", bos=False)
    demo = tv.Example("<10> <11>", "<12>")
    episodes = [
        tv.Episode("t", (demo,), tv.Example(f"<{i}>", "<5>"), template) for i in range(20, 24)
    ]
    with pytest.raises(ValueError, match=message):
        attribute_demonstrations(model, episodes, 1)


@pytest.fixture(scope="module")
def planted_model() -> Any:
    return planted.planted()


@pytest.fixture(scope="module")
def shifts() -> list[tv.Episode]:
    return tv.sample_episodes(planted.tasks(), 20, 4, seed=0, template=TEMPLATE)


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*distinct inputs")
def test_the_planted_head_gets_all_and_the_rest_nothing(
    planted_model: Any, shifts: list[tv.Episode]
) -> None:
    found = attribute_demonstrations(planted_model, shifts, 2, centred=True)
    at = found.heads.index(WRITER)
    rest = [place for place in range(len(found.heads)) if place != at]
    # Each demonstration has one answer, and the writer averages what stands there.
    demos = found.by_head[:, at, 1:-1]
    torch.testing.assert_close(demos, torch.full_like(demos, 0.25), atol=1e-3, rtol=0)
    assert found.by_head[:, at, [0, -1]].abs().max() < 1e-4
    assert found.by_head[:, rest].abs().max() < 1e-4
    truth = torch.nn.functional.normalize(
        planted.planted_directions() - planted.planted_directions().mean(dim=0), dim=-1
    )
    torch.testing.assert_close(found.directions, truth, atol=1e-2, rtol=0)
    # Of all heads, along the planted directions themselves and without centring.
    vectors = tv.task_vectors(tv.collect(planted_model, shifts))
    own = replace(vectors, values=planted.planted_directions()[:, None].repeat(1, 5, 1))
    alone = attribute_demonstrations(planted_model, shifts, 4, vectors=own)
    share = alone.by_head[:, alone.heads.index(WRITER), 1:-1]
    torch.testing.assert_close(share, torch.full_like(share, 0.25), atol=1e-4, rtol=0)
    assert (alone.by_head.abs() > 1e-4).sum() == share.numel()
    # The reader fetches the query and nothing else.
    reader = attribute_demonstrations(planted_model, shifts, heads=[READER])
    torch.testing.assert_close(
        reader.shares[:, -1], torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0
    )


@pytest.mark.filterwarnings("ignore:.*distinct inputs")
def test_a_demonstration_of_another_task_writes_against_the_task(
    planted_model: Any, shifts: list[tv.Episode]
) -> None:
    """The planted head averages, and another shift has another direction."""
    directions = planted.planted_directions()
    odd = []
    for episode in shifts:
        first = episode.demos[0]
        shift = int(episode.task.split()[1])
        other = tv.Example(first.x, f"a{(int(first.x[1:]) + (3 if shift != 3 else 0)) % 6}")
        odd.append(replace(episode, demos=(other, *episode.demos[1:])))
    vectors = tv.task_vectors(tv.collect(planted_model, shifts))
    own = replace(vectors, values=directions[:, None].repeat(1, 5, 1))
    found = attribute_demonstrations(planted_model, odd, 1, vectors=own)
    assert found.shares[:, 1].abs().max() < 1e-3
    torch.testing.assert_close(
        found.shares[:, 2:5], torch.full((3, 3), 1 / 3, dtype=torch.float64), atol=1e-3, rtol=0
    )


def test_a_lab_model_is_split_by_its_vectors() -> None:
    model, problem = lab.shipped_run().model(), lab.SparseLinearMixture.small()
    episodes = lab.problem_episodes(problem, n=3, n_shots=5)
    found = attribute_demonstrations(model, episodes, 1)
    out = tv.collect(model, episodes, hook="attn_out", layers=[0, 1]).values
    wanted = torch.stack([out[3 * task : 3 * task + 3].mean(dim=0) for task in range(4)])
    total = found.written.sum(dim=2) + found.bias
    torch.testing.assert_close(total, wanted, atol=1e-5, rtol=1e-4)
    assert found.tokens[0].tolist() == pytest.approx([0, *[2 / 11] * 5, 1 / 11])


@pytest.mark.slow
@pytest.mark.model
def test_the_parts_sum_on_smollm2(smollm2: Any) -> None:
    episodes = tv.sample_episodes(
        tv.find_tasks(["singular_plural", "en_fr"]), n=1, n_shots=4, seed=0
    )
    found = attribute_demonstrations(smollm2, episodes, 29)
    names = [f"blocks.{layer}.hook_attn_out" for layer in range(30)]
    for row, episode in enumerate(episodes):
        cached = last_cached(smollm2, episode, names)
        for layer, name in enumerate(names):
            total = found.written[row, layer].sum(dim=0) + found.bias[row, layer]
            out = cached[name][-1]
            assert float((total - out).norm() / out.norm()) < 1e-6


def test_the_table_and_the_figure_say_what_the_result_holds(
    model: Any, few_shot: list[tv.Episode]
) -> None:
    twice = [*few_shot, *few_shot[:2]]
    found = attribute_demonstrations(model, twice, 2)
    frame = found.to_frame()
    assert len(frame) == 2 * 5 and len(found.to_frame("layer")) == 2 * 3 * 5
    assert len(found.to_frame("head")) == 2 * 12 * 5
    first = frame[frame.task == "singular_plural"]
    assert float(first.share.sum()) == pytest.approx(1) and float(
        first.tokens.sum()
    ) == pytest.approx(1)
    assert float(first.attention.sum()) == pytest.approx(1, abs=1e-5)
    assert set(first.n) == {5} and set(first.n_distinct) == {3}
    assert (frame.low <= frame.share).all() and (frame.share <= frame.high).all()
    # A query that occurs twice counts once.
    along = found.projections[[0, 1, 2]].double().mean(dim=0)
    torch.testing.assert_close(found.by_head[0], along / along.sum(), atol=1e-6, rtol=1e-4)
    layers = found.to_frame("layer")
    head = found.to_frame("head")
    totals = head.groupby(["task", "layer", "part"]).share.sum()
    for row in layers.itertuples():
        assert row.share == pytest.approx(totals[row.task, row.layer, row.part], abs=1e-9)
    assert "3 demonstrations" in repr(found) and found.to_frame().equals(frame)
    ax = plot_attribution(found, task="en_fr")
    shown = torch.tensor(ax.images[0].get_array().tolist())
    plt.close(ax.figure)
    torch.testing.assert_close(shown, found.by_layer[1].T.float(), atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="no attribution of 'x'"):
        plot_attribution(found, task="x")
    with pytest.raises(ValueError, match="by is 'task'"):
        found.to_frame("task")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "give a layer"),
        ({"heads": []}, "heads is empty"),
        ({"heads": [(0, 4)]}, r"head \(0, 4\) does not exist; layers have heads 0 to 3"),
        ({"heads": [(0, 1), (0, 1)]}, "names a head twice"),
        ({"layer": 0, "heads": [(1, 1)]}, r"head \(1, 1\) is above layer 0"),
        ({"layer": 3}, "layer 3 is out of range"),
        ({"layer": 1, "centred": True, "tasks": 1}, "centred takes the mean over tasks"),
        ({"layer": 1, "shots": True}, "the episodes have 2 and 3 demonstrations"),
        ({"layer": 1, "zero": True}, "the episodes have 0 demonstrations"),
    ],
)
def test_what_cannot_be_attributed_is_refused(
    model: Any, few_shot: list[tv.Episode], change: dict, message: str
) -> None:
    episodes, change = list(few_shot), dict(change)
    if change.pop("tasks", None):
        episodes = episodes[:3]
    if change.pop("shots", None):
        episodes[0] = replace(episodes[0], demos=episodes[0].demos[:2])
    if change.pop("zero", None):
        episodes = tv.zero_shot(episodes)
    layer = change.pop("layer", None)
    with pytest.raises(ValueError, match=message):
        attribute_demonstrations(model, episodes, layer, **change)


def test_vectors_must_be_this_models_and_have_the_layer(
    model: Any, few_shot: list[tv.Episode]
) -> None:
    vectors = tv.task_vectors(tv.collect(model, few_shot, layers=[1]))
    with pytest.raises(ValueError, match="layer 2 is not among"):
        attribute_demonstrations(model, few_shot, 2, vectors=vectors)
    with pytest.raises(ValueError, match="say after which layer"):
        attribute_demonstrations(model, few_shot, heads=[(1, 1)], vectors=vectors)
    other = replace(vectors, source=replace(vectors.source, model="another"))
    with pytest.raises(ValueError, match="come from 'another'"):
        attribute_demonstrations(model, few_shot, 1, vectors=other)
    found = attribute_demonstrations(model, few_shot, 1, vectors=vectors)
    unit = torch.nn.functional.normalize(vectors["en_fr", 1], dim=0)
    torch.testing.assert_close(found.directions[1], unit)
