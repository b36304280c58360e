"""Pooled constituents: by hand one prompt at a time, on planted truth, and what is refused."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import planted
import pytest
import torch
from planted import TEMPLATE, WRITER

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.analysis.robustness import (
    CONTROL,
    PoolingRobustness,
    pooling_robustness,
)
from transformer_lens_taskvec.interventions.variants import PromptHook
from transformer_lens_taskvec.plots.robustness import plot_pooling_robustness

pytestmark = pytest.mark.filterwarnings("ignore:.*distinct inputs")


@pytest.fixture(scope="module")
def few_shot() -> list[tv.Episode]:
    """Prompts of several lengths, and answers of one token or several."""
    tasks = tv.find_tasks(["singular_plural", "en_fr"])
    template = tv.PromptTemplate("{x} -> {y}")
    two = tv.sample_episodes(tasks, n=5, n_shots=2, seed=0, template=template)
    return [*two, *tv.sample_episodes(tasks, n=2, n_shots=1, seed=1, template=template)]


def by_hand(
    model: Any, episode: tv.Episode, words: list[tuple[int, int]], start: int, how: str
) -> tuple[float, torch.Tensor]:
    """The answer's loss and the states of the last token, pooling with one unpadded run."""
    encode = model.tokenizer.encode
    prompt = encode(episode.prompt, add_special_tokens=False)
    answer = encode(episode.answer, add_special_tokens=False)
    lengths = [len(model.tokenizer.decode(prompt[: at + 1])) for at in range(len(prompt))]
    states: list[torch.Tensor] = []

    def pool(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        edited = activation.clone()
        for begin, end in words:
            own = [at for at, length in enumerate(lengths) if begin < length <= end]
            some = activation[0, own]
            pooled = {"mean": some.mean(0), "max": some.amax(0), "sum": some.sum(0)}[how]
            edited[0, own] = pooled if len(own) > 1 else some
        return edited

    hooks: list[Any] = [(f"blocks.{layer}.hook_resid_pre", pool) for layer in range(start, 3)]

    def keep(activation: torch.Tensor, hook: Any) -> None:
        states.append(activation[0, len(prompt) - 1])

    hooks += [(f"blocks.{layer}.hook_resid_post", keep) for layer in range(3)]
    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([prompt + answer]), fwd_hooks=hooks)
    logp = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return -float(logp[range(len(answer)), answer].sum()), torch.stack(states)


def words_of(text: str) -> list[tuple[int, int]]:
    found, at = [], 0
    for piece in text.replace("->", "  ").split():
        begin = text.index(piece, at)
        at = begin + len(piece)
        found.append((begin, at))
    return found


@pytest.mark.model
@pytest.mark.parametrize("how", ["mean", "max", "sum"])
def test_pooling_is_what_a_hook_by_hand_does_one_prompt_at_a_time(
    model: Any, few_shot: list[tv.Episode], how: str
) -> None:
    for spans in ("words", lambda episode: [(0, episode.prompt.index("\n") - 1)]):
        found = pooling_robustness(model, few_shot, spans, how=how, layer=2, k=3, max_tokens=200)
        assert found.start_layers == (0, 1, 2) and found.unpooled.loss.shape == (14,)
        for at, start in enumerate(found.start_layers):
            scores = found.pooled["constituents"][at]
            states = []
            for row, episode in enumerate(few_shot):
                own = words_of(episode.prompt) if spans == "words" else spans(episode)
                loss, state = by_hand(model, episode, own, start, how)
                assert float(scores.loss[row]) == pytest.approx(loss, abs=2e-3, rel=1e-4)
                states.append(state[2])
            apart = torch.cdist(torch.stack(states), torch.stack(states)).fill_diagonal_(torch.inf)
            nearest = apart.topk(3, largest=False).indices
            votes = scores.labels[nearest].float().mean(dim=1).round().long()
            assert scores.metrics["decoded"].equal((votes == scores.labels).float())
        changed = [scores.loss - found.unpooled.loss for scores in found.pooled["constituents"]]
        assert all(one.abs().max() > 1e-3 for one in changed)


@pytest.mark.model
def test_random_spans_are_as_many_and_as_long(
    model: Any, few_shot: list[tv.Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformer_lens_taskvec.analysis import robustness as module

    seen: list[Any] = []
    pooling = module._pooling

    def spied(spans: Any, how: str, batch: Any) -> Any:
        seen.append(spans)
        return pooling(spans, how, batch)

    monkeypatch.setattr(module, "_pooling", spied)
    once, again, other = (
        pooling_robustness(model, few_shot, start_layers=[1], k=3, seed=seed) for seed in (4, 4, 5)
    )
    words, control = seen[0], seen[2]
    assert words != control
    for own, random, episode in zip(words, control, few_shot, strict=True):
        ids = model.tokenizer.encode(episode.prompt, add_special_tokens=False)
        assert sorted(b - a for a, b in own) == sorted(b - a for a, b in random)
        flat = [at for a, b in random for at in range(a, b)]
        assert len(set(flat)) == len(flat) and max(flat, default=-2) < -1  # the arrow
        assert min(flat, default=0) >= -len(ids)
        if not own or own[0][0] > -len(ids):
            assert -len(ids) not in flat
    for name in once.pooled:
        assert once.pooled[name][0].loss.equal(again.pooled[name][0].loss)
    assert not once.pooled[CONTROL][0].loss.equal(other.pooled[CONTROL][0].loss)
    assert once.pooled["constituents"][0].loss.equal(other.pooled["constituents"][0].loss)
    spared = [
        sum(b - a - 1 for a, b in own)
        / len(model.tokenizer.encode(episode.prompt, add_special_tokens=False))
        for own, episode in zip(words, few_shot, strict=True)
    ]
    assert once.reduction == pytest.approx(sum(spared) / len(spared))
    alone = pooling_robustness(model, few_shot, start_layers=[1], k=3, control=False)
    assert list(alone.pooled) == ["constituents"]


@pytest.fixture(scope="module")
def planted_model() -> Any:
    return planted.planted()


@pytest.fixture(scope="module")
def shifts() -> list[tv.Episode]:
    return tv.sample_episodes(planted.tasks(), 20, 4, seed=0, template=TEMPLATE)


@pytest.mark.model
def test_pooling_does_nothing_where_the_planted_model_does_not_read(
    planted_model: Any, shifts: list[tv.Episode]
) -> None:
    def demonstrations(episode: tv.Episode) -> list[tuple[int, int]]:
        begins = episode.examples_begin
        return list(zip(begins, begins[1:], strict=False))

    found = pooling_robustness(planted_model, shifts, demonstrations, k=5)
    assert found.layer == WRITER[0] and found.unpooled.accuracy == 1
    # The shift stands at answers after layer 0, and the writer reads it in layer 1: nothing reads
    # the demonstrations any more behind it.
    assert found.accuracy()[2:].eq(1).all() and found.relative_drop()[2:].eq(0).all()
    for scores in found.pooled["constituents"][2:]:
        torch.testing.assert_close(scores.loss, found.unpooled.loss, atol=1e-5, rtol=1e-3)
        assert scores.metrics["decoded"].eq(1).all()
    # Where pairs are not yet made, pooling them leaves no task at all.
    assert found.accuracy()[0] < 0.5
    assert found.pooled["constituents"][0].metrics["decoded"].mean() < 0.7
    frame = found.to_frame()
    own = frame[(frame.spans == "constituents") & (frame.start_layer >= 2)]
    assert (own.relative_drop == 0).all() and (own.drop_low < 0).all() and (own.drop_high > 0).all()
    assert (frame.n == 20).all() and (frame.n_distinct == 6).all()


@pytest.mark.model
def test_pooling_what_the_planted_head_does_not_read_leaves_it_the_task(
    planted_model: Any, shifts: list[tv.Episode]
) -> None:
    def arrows(episode: tv.Episode) -> list[tuple[int, int]]:
        """The query and arrow of each demonstration: not the token that holds the shift."""
        return [(begin, begin + 4) for begin in episode.examples_begin[:-1]]

    found = pooling_robustness(planted_model, shifts, arrows, k=5, start_layers=[0, 1])
    assert found.accuracy()[1] == 1  # pairs are made in layer 0
    assert found.comparison(1).to_frame().against.unique().tolist() == [CONTROL, "unpooled"]


def test_a_lab_models_vectors_are_pooled_by_position() -> None:
    model, problem = lab.shipped_run().model(), lab.SparseLinearMixture.small()
    episodes = lab.problem_episodes(problem, n=6, n_shots=5)
    found = pooling_robustness(model, episodes, lambda episode: [(0, 2), (4, 6)], k=5)
    assert found.unpooled.loss_kind == "squared_error"
    assert found.pooled["constituents"][0].loss.ne(found.unpooled.loss).all()
    with pytest.raises(ValueError, match="prompts of vectors have no words"):
        pooling_robustness(model, episodes)


def test_of_one_task_there_is_no_decodability(model: Any, few_shot: list[tv.Episode]) -> None:
    own = [episode for episode in few_shot if episode.task == "en_fr"]
    found = pooling_robustness(model, own, start_layers=[1])
    assert found.layer is None and "decoded" not in found.to_frame()
    assert len(plot_pooling_robustness(found)) == 1


def test_the_figure_and_the_table_say_what_the_scores_do(
    model: Any, few_shot: list[tv.Episode]
) -> None:
    found = pooling_robustness(model, few_shot, k=3)
    assert isinstance(found, PoolingRobustness)
    frame = found.to_frame()
    assert len(frame) == 2 * 3 * 2
    first = frame.iloc[0]
    own = found.pooled["constituents"][0].of(first.task)
    assert (first.accuracy, first.loss) == (own.accuracy, own.mean_loss)
    assert first.decoded == own.mean("decoded")
    accuracy, td = plot_pooling_robustness(found)
    for ax, metric in ((accuracy, "correct"), (td, "decoded")):
        shown = ax.lines[0].get_ydata()
        assert list(shown) == [one.mean(metric) for one in found.pooled["constituents"]]
    plt.close(accuracy.figure)
    assert "unpooled" in repr(found)


def test_a_prompt_hook_alone_does_not_know_the_prompts(model: Any) -> None:
    hook = PromptHook("blocks.0.hook_resid_pre", lambda batch: lambda activation, hook=None: None)
    with pytest.raises(ValueError, match="must know which prompts the rows are"):
        model.run_with_hooks(torch.tensor([[3, 4]]), fwd_hooks=[tuple(hook)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"how": "median"}, "how is 'median'"),
        ({"spans": "phrases"}, "spans is 'phrases'"),
        ({"spans": [[(0, 2)]]}, "there are spans of 1 prompts, and 14 episodes"),
        ({"spans": lambda episode: [(4, 8), (2, 5)]}, "overlaps the one before"),
        ({"spans": lambda episode: [(0, 9999)]}, "leaves the prompt"),
        ({"spans": lambda episode: [(0, 1)]}, "no constituent has several tokens"),
        ({"start_layers": [3]}, "layer 3 is out of range"),
        ({"layer": 7}, "layer 7 is out of range"),
    ],
)
def test_what_cannot_be_pooled_is_refused(
    model: Any, few_shot: list[tv.Episode], change: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pooling_robustness(model, few_shot, **{"k": 3, **change})
