"""Heads screened by attribution patching: the estimates, and what is measured of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.vectors.screening import estimated_effects

STEPS = {"llama": 3e-3, "gemma2": 3e-3, "gpt2": 3e-4, "opt": 3e-4}
"""Of finite differences, by model; root mean square norms round to float32, whatever the dtype."""

STENCIL = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}

pytestmark = pytest.mark.filterwarnings("ignore:.*one intervention at a time")


@pytest.fixture(scope="module")
def few_shot() -> list[tv.Episode]:
    """Prompts of several lengths, with answers of one token and of several."""
    return tv.sample_episodes(tv.find_tasks(["singular_plural", "en_fr"]), n=4, n_shots=3, seed=0)


@pytest.fixture(scope="module")
def patches(few_shot: list[tv.Episode]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {e.task: torch.randn(3, 4, 8, generator=generator) for e in few_shot}


def probability(model: Any, episode: tv.Episode, hooks: list[Any], position: int | None) -> float:
    """One unpadded run by hand; the hooks are given the places where they act."""
    encode = model.tokenizer.encode
    prompt = encode(episode.prompt, add_special_tokens=False)
    answer = encode(episode.answer, add_special_tokens=False)
    at = len(prompt) - 1
    where = slice(None) if position is None else position % len(prompt)
    with torch.no_grad():
        logits = model.run_with_hooks(
            torch.tensor([prompt + answer]), fwd_hooks=[(name, f(where)) for name, f in hooks]
        )
    logp = logits[0, at:-1].log_softmax(-1)
    return float(logp[range(len(answer)), answer].sum().exp())


def towards(patch: torch.Tensor, head: int, step: float) -> Any:
    """Go a step of the way from a head's output to another."""

    def at(where: Any) -> Any:
        def edit(z: torch.Tensor, hook: Any) -> torch.Tensor:
            edited = z.clone()
            edited[:, where, head] += step * (patch - z[:, where, head])
            return edited

        return edit

    return at


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("position", [-1, None, 0, -3])
def test_an_estimate_is_the_slope_of_the_exact_effect(
    kind: str,
    position: int | None,
    tokenizer: Any,
    few_shot: list[tv.Episode],
    patches: dict[str, torch.Tensor],
) -> None:
    model, size = zoo.bridge(kind, tokenizer), STEPS[kind]
    model.original_model.to(torch.float64)
    found = estimated_effects(model, few_shot, patches, position=position)
    for task, by_head in zip(patches, found, strict=True):
        own = [episode for episode in few_shot if episode.task == task]
        for layer, head in ((0, 1), (2, 2)):
            name, patch = f"blocks.{layer}.attn.hook_z", patches[task][layer, head]
            slope = 0.0
            for episode in own:
                slope += sum(
                    weight * probability(model, episode, [(name, hook)], position)
                    for step, weight in STENCIL.items()
                    for hook in [towards(patch, head, step * size)]
                ) / (size * len(own))
            rounding = 1e-2 * float(by_head.abs().max())
            assert float(by_head[layer, head]) == pytest.approx(slope, rel=1e-2, abs=rounding)


@pytest.mark.model
@pytest.mark.parametrize("ablation", [None, "zero", "mean"])
def test_screened_heads_have_the_effects_of_the_full_measurement(
    model: Any, few_shot: list[tv.Episode], ablation: str | None
) -> None:
    full = tv.head_effects(model, few_shot, ablation=ablation, metrics=["rank"])
    some = tv.head_effects(model, few_shot, ablation=ablation, metrics=["rank"], screen=5)
    assert full.estimate is None and full.measured.all() and some.measured.sum() == 5
    assert some.estimate is not None
    largest = some.estimate.abs().mean(dim=0)
    assert largest[some.measured].min() >= largest[~some.measured].max()
    for name, values in full.by_task.items():
        kept = some.by_task[name]
        torch.testing.assert_close(
            kept[:, some.measured], values[:, some.measured], atol=1e-6, rtol=1e-4
        )
        assert kept[:, ~some.measured].isnan().all() and not kept[:, some.measured].isnan().any()
    torch.testing.assert_close(
        some.interval[:, some.measured], full.interval[:, some.measured], atol=1e-4, rtol=1e-3
    )
    ranked = [place for place in full.top(12) if some.measured[place]]
    assert list(some.top(5)) == ranked
    with pytest.raises(ValueError, match="6 heads are asked for; 5 of 12 were measured"):
        some.top(6)
    every = tv.head_effects(model, few_shot, ablation=ablation, screen=12)
    assert every.top(12) == full.top(12)


def test_what_was_not_measured_is_nan_in_tables_and_grey_in_figures(
    model: Any, few_shot: list[tv.Episode]
) -> None:
    effects = tv.head_effects(model, few_shot, screen=3)
    frame = effects.to_frame()
    assert len(frame) == 2 * 12 and frame.estimate.notna().all()
    columns = ["probability", "log_probability", "low", "high"]
    assert (frame[columns].isna().sum() == 2 * 9).all()
    assert "3 of 12 heads measured" in repr(effects) and "nan" not in repr(effects)
    ax = tv.plot_head_effects(effects)
    assert ax.images[0].get_array().mask.sum() == 9
    assert ax.images[0].get_clim()[1] == pytest.approx(
        float(effects.log_probability.nan_to_num(0).abs().max())
    )
    plt.close(ax.figure)
    vectors = tv.function_vectors(model, few_shot, n_heads=3, effects=effects)
    assert vectors.source.heads == effects.top(3) and vectors.values.isfinite().all()


@pytest.mark.model
def test_estimates_do_not_depend_on_the_batch(
    model: Any, few_shot: list[tv.Episode], patches: dict[str, torch.Tensor]
) -> None:
    together = estimated_effects(model, few_shot, patches, max_tokens=10_000)
    alone = estimated_effects(model, few_shot, patches, max_tokens=1)
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-3)
    # Each distinct query counts once.
    again = estimated_effects(model, [*few_shot, few_shot[0]], patches)
    torch.testing.assert_close(together, again, atol=1e-12, rtol=1e-3)


@pytest.mark.model
def test_screening_leaves_nothing_on_the_model(
    model: Any, few_shot: list[tv.Episode], patches: dict[str, torch.Tensor]
) -> None:
    def state() -> Any:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
        return hooks, flags, [m.training for m in model.modules()]

    parameter = next(iter(model.parameters()))
    needed, gradient = parameter.requires_grad, torch.ones_like(parameter)
    parameter.requires_grad_(True).grad = gradient
    before, weights = state(), [p.clone() for p in model.parameters()]
    estimated_effects(model, few_shot, patches)
    assert state() == before
    assert parameter.grad is gradient and torch.equal(gradient, torch.ones_like(gradient))
    assert all(map(torch.equal, weights, model.parameters()))
    parameter.grad = None
    parameter.requires_grad_(needed)


@pytest.fixture
def frozen(model: Any) -> Iterator[Any]:
    needed = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    yield model
    for parameter, one in zip(model.parameters(), needed, strict=True):
        parameter.requires_grad_(one)


@pytest.mark.model
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_frozen_weights_and_passes_without_gradients_around_do_not_matter(
    frozen: Any, few_shot: list[tv.Episode], patches: dict[str, torch.Tensor], mode: Any
) -> None:
    with mode():
        found = estimated_effects(frozen, few_shot, patches)
    frozen.requires_grad_(True)
    wanted = estimated_effects(frozen, few_shot, patches)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-4)


@pytest.mark.model
def test_logits_are_made_where_answers_are_predicted_only(
    model: Any, few_shot: list[tv.Episode], patches: dict[str, torch.Tensor]
) -> None:
    lengths: list[int] = []
    handle = model.unembed.register_forward_hook(
        lambda module, args, logits: lengths.append(logits.shape[1])
    )
    estimated_effects(model, few_shot, patches)
    handle.remove()
    answers = [model.tokenizer.encode(e.answer, add_special_tokens=False) for e in few_shot]
    assert max(lengths) == max(map(len, answers))


@pytest.mark.parametrize("screen", [0, -1, 13, True])
def test_the_number_of_screened_heads_must_fit_the_model(
    model: Any, few_shot: list[tv.Episode], screen: int
) -> None:
    with pytest.raises(ValueError, match=f"screen is {screen}; it must be from 1 to 12"):
        tv.head_effects(model, few_shot, screen=screen)


def test_what_cannot_be_screened_is_refused(
    model: Any, few_shot: list[tv.Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: x)]),
        pytest.raises(ValueError, match="carries hooks of yours"),
    ):
        tv.head_effects(model, few_shot, screen=3)
    run = model.run_with_hooks
    monkeypatch.setattr(model, "run_with_hooks", torch.no_grad()(run))
    with pytest.raises(ValueError, match="no gradients flow"):
        tv.head_effects(model, few_shot, screen=3)


def test_answers_that_are_numbers_are_not_screened() -> None:
    config = lab.RegressionConfig(d_input=4, n_points=6, n_layers=2, n_heads=2, d_model=16)
    problem = lab.SparseLinearMixture.orthogonal(2, 2, n_points=6)
    episodes, model = lab.problem_episodes(problem, 4), lab.RegressionTransformer(config)
    with pytest.raises(ValueError, match="these answers are numbers"):
        tv.head_effects(model.eval(), episodes, screen=2)


def recall(model: Any, tasks: Any, n: int, shots: int, best: int, screen: int) -> dict[str, int]:
    """How many of the exact best heads the screened ones hold, in two rankings."""
    sets = tv.sample_splits(tasks, {"clean": n, "test": n}, n_shots=shots, seed=0)
    seconds, found = [], []
    for one in (None, screen):
        start = time.process_time()
        found.append(tv.head_effects(model, sets["clean"], on=sets["test"], screen=one))
        seconds.append(time.process_time() - start)
    full, some = found
    held = some.measured.flatten()
    rankings = {"probability": full.probability, "absolute": full.probability.abs()}
    hits = {
        name: int(held[values.flatten().topk(best).indices].sum())
        for name, values in rankings.items()
    }
    print(
        f"\n{model.cfg.model_name}: of the exact top {best}, {hits} in {screen} of "
        f"{held.numel()} heads; seconds of processor for all: {seconds[0]:.1f}, screened: "
        f"{seconds[1]:.1f}"
    )
    return hits


def test_the_toys_top_heads_are_among_the_screened() -> None:
    hits = recall(tv.load_model("toy"), tv.bitwise_tasks(null=False), 40, 4, best=5, screen=8)
    assert hits == {"probability": 5, "absolute": 5}


@pytest.mark.slow
def test_smollm2s_top_heads_are_among_the_screened(smollm2: Any) -> None:
    tasks = tv.find_tasks(["antonyms", "singular_plural", "present_gerund", "next_letter"])
    hits = recall(smollm2, tasks, 10, 5, best=20, screen=60)
    assert min(hits.values()) >= 19
