"""What a plan says is what then runs: every forward call, and every token that enters a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import controls, lab, scoring
from transformer_lens_taskvec.interventions.variants import Variant
from transformer_lens_taskvec.models import carried, counted, prefixes
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.counted import Count, Counted
from transformer_lens_taskvec.models.protocol import inference
from transformer_lens_taskvec.models.replay import most_alive
from transformer_lens_taskvec.planning import plan_job

pytestmark = pytest.mark.filterwarnings("ignore:.*one intervention at a time")


@dataclass
class Ran:
    """What a real model was made to run."""

    calls: int = 0
    entering: int = 0
    depth: int = 1

    @property
    def tokens(self) -> int:
        return round(self.entering / self.depth)


@contextmanager
def watching(model: Any) -> Iterator[Ran]:
    """Count forward calls, and the tokens that enter each block, on the model itself."""
    ran = Ran(depth=int(model.cfg.n_layers))
    run = model.run_with_hooks

    def call(*args: Any, **kwargs: Any) -> Any:
        ran.calls += 1
        return run(*args, **kwargs)

    handles = []
    for layer in range(ran.depth):
        inner = block = model.blocks[layer]
        if hasattr(model, "original_model"):
            # Inside the block, since the engine's own hooks narrow what enters it.
            inner = block.ln1 if hasattr(block, "ln1") else block.norm

        def enter(module: Any, args: Any, kwargs: Any = None) -> None:
            found = args[0] if args else next(iter(kwargs.values()))
            ran.entering += found.shape[:2].numel()

        handles.append(inner.register_forward_pre_hook(enter, with_kwargs=True))
    model.__dict__["run_with_hooks"] = call
    try:
        yield ran
    finally:
        del model.__dict__["run_with_hooks"]
        for handle in handles:
            handle.remove()


def ready(model: Any, episodes: Any, variants: Any, **options: Any) -> None:
    """What a model is asked once: what it can do, and the shapes at its hook points."""
    with inference(model):
        capabilities(model)
    tv.evaluate_many(model, list(episodes)[:1], variants, **options)


def check(model: Any, episodes: Any, variants: Any, **options: Any) -> tv.Plan:
    plan = tv.plan(model, episodes, variants, tokens_per_second=1000, **options)
    count = Count()
    stood_in = tv.evaluate_many(Counted(model, count), episodes, variants, **options)
    ready(model, episodes, variants, **options)
    with watching(model) as ran, pytest.MonkeyPatch.context() as patch:
        # The hooks that watch are not to be taken for the caller's.
        patch.setattr(carried, "_OWN", (*carried._OWN, __name__))
        found = tv.evaluate_many(model, episodes, variants, **options)
    assert type(stood_in) is type(found)
    assert (plan.passes, plan.tokens) == (ran.calls, ran.tokens)
    assert plan.passes == len(count.passes)
    assert plan.seconds == plan.tokens / 1000 and plan.peak_memory > 0
    return plan


def all_layers(vectors: tv.TaskVectors, task: str = "en_fr") -> list[Variant]:
    return [[], *(vectors.inject(task, layer) for layer in vectors.layers)]


@pytest.mark.model
@pytest.mark.parametrize("n_edits", [0, 1, 3])
@pytest.mark.parametrize("observe", [None, tv.Observe("resid_post", [1])])
def test_a_plan_is_what_runs(
    model: Any,
    episodes: list[tv.Episode],
    vectors: tv.TaskVectors,
    n_edits: int,
    observe: tv.Observe | None,
) -> None:
    options = {} if observe is None else {"observe": observe}
    check(model, episodes, all_layers(vectors)[: 1 + n_edits], **options)
    check(model, episodes, all_layers(vectors)[: 1 + n_edits], max_tokens=60, **options)
    check(model, tv.zero_shot(episodes), lambda task: all_layers(vectors, task), **options)


@pytest.mark.model
def test_tokens_that_prompts_share_are_planned_once(
    model: Any,
    episodes: list[tv.Episode],
    vectors: tv.TaskVectors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefixes, "_PASS", 0)  # worth it in a model as small as this, too
    queries = [episode.query for episode in episodes if episode.task == "en_fr"]
    first = max(episodes, key=lambda episode: episode.n_shots)
    alike = [replace(first, query=query) for query in queries]
    plan = check(model, alike, all_layers(vectors))
    check(model, [*alike, *episodes], all_layers(vectors), max_tokens=200)
    if capabilities(model).packs:
        apart = sum(check(model, [one], all_layers(vectors)).tokens for one in alike)
        assert plan.tokens < apart


@pytest.mark.model
def test_what_runs_plainly_is_planned_as_it_runs(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    early = tv.inject(vectors["en_fr", 0], 0, position=1)
    called = []

    def mine(activation: torch.Tensor, hook: Any = None) -> torch.Tensor:
        called.append(activation.shape)
        return activation

    variants = [[], [early], [("blocks.1.hook_resid_post", mine)], vectors.inject("en_fr", 1)]
    plan = tv.plan(model, episodes, variants, tokens_per_second=1.0)
    assert not called, "a function of the caller's is not called before the run"
    assert check(model, episodes, variants).tokens == plan.tokens and called
    check(model, episodes, variants, observe=tv.Observe("z", [2, 0]), max_tokens=60)


@pytest.mark.model
def test_a_model_that_carries_hooks_is_planned_as_it_runs(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    called = []

    def mine(activation: torch.Tensor, hook: Any = None) -> None:
        called.append(activation.shape)

    mine.__module__ = "mine"
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", mine)]):
        with pytest.warns(UserWarning, match="hooks of yours"):
            check(model, episodes[:3], all_layers(vectors))
        before = len(called)
        with pytest.warns(UserWarning, match="hooks of yours"):
            tv.plan(model, episodes[:3], all_layers(vectors))
    assert len(called) == before
    with model.hooks(fwd_hooks=[vectors.inject("en_fr", 1)[0]]):
        check(model, episodes, all_layers(vectors))


@pytest.mark.parametrize("kind", ["mamba", "gemma2", "gpt2", "opt", "gpt_neox"])
def test_other_architectures_are_planned_as_they_run(kind: str, tokenizer: Any) -> None:
    model = zoo.bridge(kind, tokenizer, **({"sliding_window": 8} if kind == "gemma2" else {}))
    episodes = tv.sample_episodes(tv.find_tasks(["en_fr", "upper_case"]), 3, 2, seed=0)
    vectors = tv.task_vectors(tv.collect(model, episodes))
    check(model, episodes, all_layers(vectors), observe=tv.Observe())
    check(model, tv.zero_shot(episodes), all_layers(vectors))


def test_models_of_the_lab_are_planned_as_they_run() -> None:
    model = lab.shipped_run().model()
    episodes = lab.problem_episodes(lab.SparseLinearMixture.small(), n=3, n_shots=4)
    vectors = tv.task_vectors(tv.collect(model, episodes))
    plan = check(
        model,
        episodes,
        lambda task: [[], vectors.inject(task, 2)],
        observe=tv.Observe("z"),
    )
    assert set(plan.by_kind) == {"numbers"}


def test_collecting_is_counted_to_the_last_layer_that_is_read(
    smollm2: Any, episodes: list[tv.Episode]
) -> None:
    count = Count()
    found = tv.collect(Counted(smollm2, count), episodes, layers=[2, 0])
    assert found.values.shape == (len(episodes), 2, 576)
    assert len(count.passes[-1].layers) == 3
    with watching(smollm2) as ran, pytest.MonkeyPatch.context() as patch:
        patch.setattr(carried, "_OWN", (*carried._OWN, __name__))
        real = tv.collect(smollm2, episodes, layers=[2, 0])
    assert ran.calls == len(count.passes)
    assert ran.entering == sum(one.rows * sum(one.layers) for one in count.passes)
    assert found.source == real.source and not found.values.equal(real.values)


def test_a_plan_says_it_in_plain_words(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    plan = tv.plan(model, episodes, all_layers(vectors), tokens_per_second=100)
    text = f"Plan({plan.tokens:,} tokens in {plan.passes} passes, "
    assert repr(plan).startswith(text) and "100 tokens/s" in repr(plan)
    frame = plan.to_frame()
    assert int(frame.tokens.sum()) == plan.tokens and int(frame.passes.sum()) == plan.passes
    assert plan.minutes == plan.tokens / 6000
    with pytest.raises(ValueError, match="tokens_per_second is 0"):
        tv.plan(model, episodes, [[]], tokens_per_second=0)
    with pytest.raises(ValueError, match="episodes is empty"):
        tv.plan(model, [], [[]])


def test_a_plan_leaves_the_model_as_it_was(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    before = tv.evaluate_many(model, episodes, all_layers(vectors))
    weights = [weight.clone() for weight in model.parameters()]
    tv.control_vectors(vectors, Counted(model, Count()), episodes)  # reinitialises a copy
    tv.plan(model, episodes, all_layers(vectors))
    assert all(map(torch.equal, weights, model.parameters()))
    for one, other in zip(
        before, tv.evaluate_many(model, episodes, all_layers(vectors)), strict=True
    ):
        assert torch.equal(one.loss, other.loss)
    assert all(not point.has_hooks() for point in model.hook_dict.values())


def test_a_whole_job_is_planned_by_doing_all_but_its_passes(tmp_path: Path) -> None:
    model, tasks = tv.load_model("toy"), tv.bitwise_tasks(null=False)

    def job(through: Any, folder: Path) -> None:
        tv.run_experiment(through(model), tasks, n_shots=4, n=12).save(folder)

    def all_wrong(model: Any, episodes: Any, scores: tv.Scores, groups: Any) -> tv.Scores:
        wrong = replace(scores, metrics={"correct": torch.zeros_like(scores.correct)})
        return replace(with_texts(model, episodes, wrong, groups), metrics=scores.metrics)

    plan = plan_job(job)
    with watching(model) as ran, pytest.MonkeyPatch.context() as patch:
        patch.setattr(carried, "_OWN", (*carried._OWN, __name__))
        # A plan takes all answers to be wrong, and none to end.
        with_texts, continued = scoring._with_texts, scoring.answers
        patch.setattr(scoring, "_with_texts", all_wrong)
        patch.setattr(scoring, "answers", lambda *a, **b: continued(*a, **{**b, "stop": None}))
        patch.setattr(controls, "_with_shuffled_weights", lambda same, seed: same)
        job(lambda same: same, tmp_path)
    assert plan.passes == ran.calls
    # Which layer is best, and how many blocks its branches share, shows only in the run.
    assert plan.tokens == pytest.approx(ran.tokens, rel=0.05)
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert plan.peak_memory > weights, "one of the controls is a copy of the model"


def test_the_memory_of_a_pass_is_that_of_its_tensors() -> None:
    def work() -> None:
        kept = torch.zeros(1000, 1000)
        for _ in range(3):
            kept = kept + torch.ones(1000, 1000)  # three at once: the old, the ones, the sum

    assert most_alive(work) == 3 * 4_000_000


def test_passes_that_take_time_in_proportion_are_planned_in_proportion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Time is fitted to passes with few rows; a clock that counts tokens makes it exact."""
    model = tv.load_model("toy")
    episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 20, 4, seed=0)
    ticks = [0.0]
    monkeypatch.setattr(counted, "clock", lambda: ticks[0])
    run = model.run_with_hooks

    def call(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        ticks[0] += 1e-3 + 1e-5 * tokens.numel()
        return run(tokens, *args, **kwargs)

    monkeypatch.setitem(model.__dict__, "run_with_hooks", call)
    tv.evaluate_many(model, episodes, [[]])
    before = ticks[0]
    tv.evaluate_many(model, episodes, [[]])
    taken = ticks[0] - before
    assert tv.plan(model, episodes, [[]]).seconds == pytest.approx(taken, rel=0.02)
