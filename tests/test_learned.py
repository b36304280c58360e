"""Vectors trained by gradient: the losses, the gradients, and what the vectors then do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import planted
import pytest
import torch
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.interventions.gradients import descend, trials
from transformer_lens_taskvec.interventions.intervention import altered

pytestmark = pytest.mark.filterwarnings("ignore:.*one intervention at a time")

KINDS = ["llama", "gpt2", "gpt_neox", "gemma2", "opt", "mamba"]


def variants_of(vectors: tv.TaskVectors, task: str) -> list[list[tv.Intervention]]:
    layers = vectors.layers
    joint = tv.vectors.LayerwiseVectors(vectors, mode="add")
    return [
        *(vectors.inject(task, layer) for layer in layers),
        *(vectors.inject(task, layer, mode="add", scale=0.5) for layer in layers),
        [],
        joint.inject(task, None),
        vectors.inject(task, 1, position=0),
        vectors.inject(task, 1, position=tv.interventions.Separator(-1)),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_with_gradients_are_those_of_evaluate(
    kind: str, tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    model = zoo.bridge(kind, tokenizer)
    vectors = tv.task_vectors(tv.collect(model, episodes))
    variants = variants_of(vectors, "en_fr")
    expected = torch.stack([one.loss for one in tv.evaluate_many(model, episodes, variants)], dim=1)
    with trials(model, [episodes]) as [trial]:
        found = trial.losses(variants)
    torch.testing.assert_close(found.detach().float(), expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.model
def test_gradients_are_those_of_plain_passes(model: Any, episodes: list[tv.Episode]) -> None:
    """Each vector by itself, in a pass of a whole prompt alone, through ``run_with_hooks``."""
    some = episodes[:3]
    theta = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def variants() -> list[list[tv.Intervention]]:
        return [[tv.inject(vector, layer)] for layer, vector in enumerate(theta)]

    with trials(model, [some]) as [trial]:
        (packed,) = torch.autograd.grad(trial.losses(variants()).sum(), [theta])
    plain = torch.zeros_like(theta)
    for episode in some:
        prompt, answer = (
            torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (episode.prompt, episode.answer)
        )
        tokens = torch.cat([prompt, answer[:-1]])[None]
        for layer in range(3):

            def hook(activation: Any, hook: Any = None, layer: int = layer) -> Any:
                edited = activation.clone()
                edited[:, len(prompt) - 1] = theta[layer]  # noqa: B023
                return edited

            name = f"blocks.{layer}.hook_resid_post"
            logits = model.run_with_hooks(tokens, fwd_hooks=[(name, hook)], return_type="logits")
            logp = logits[0, len(prompt) - 1 :].log_softmax(dim=-1)
            loss = -logp.gather(1, answer[:, None]).sum()
            (own,) = torch.autograd.grad(loss, [theta])
            plain += own
    torch.testing.assert_close(packed, plain, atol=1e-4, rtol=1e-4)


def test_layers_trained_at_once_are_those_trained_alone(
    tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    model = zoo.bridge("llama", tokenizer)
    losses: dict[Any, list[torch.Tensor]] = {}
    options: dict[str, Any] = {"steps": 6, "batch_size": 2, "seed": 3}

    def learn(layers: list[int] | None) -> tv.TaskVectors:
        def report(task: str, step: int, loss: torch.Tensor) -> None:
            losses.setdefault((task, *(layers or ())), []).append(loss)

        return tv.vectors.learn_vectors(model, episodes, layers=layers, report=report, **options)

    together = learn(None)
    for layer in range(3):
        alone = learn([layer])
        for task in together.tasks:
            torch.testing.assert_close(
                together[task, layer], alone[task, layer], atol=1e-3, rtol=1e-3
            )
            at_once = torch.stack(losses[(task,)])[:, layer]
            by_itself = torch.stack(losses[(task, layer)])[:, 0]
            torch.testing.assert_close(at_once, by_itself, atol=1e-4, rtol=1e-4)
    assert losses[("en_fr",)][-1].sum() < losses[("en_fr",)][0].sum()


def test_nothing_is_left_on_the_model(tokenizer: Any, episodes: list[tv.Episode]) -> None:
    model = zoo.bridge("llama", tokenizer)
    before = {name: value.clone() for name, value in model.named_parameters()}
    wanted = [value.requires_grad for value in model.parameters()]
    tv.vectors.learn_vectors(model, episodes, steps=2)
    assert [value.requires_grad for value in model.parameters()] == wanted
    assert all(value.grad is None for value in model.parameters())
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_learned_vector_does_the_planted_task() -> None:
    """All six queries at once: up to where the reader is, a vector can; past it, none can."""
    model = planted.planted()
    few_shot = tv.sample_episodes(
        planted.tasks(), n=6, n_shots=3, seed=0, template=planted.TEMPLATE
    )
    queries = tv.zero_shot(few_shot)
    assert len({episode.query_id for episode in queries}) == 18
    vectors = tv.vectors.learn_vectors(model, queries, steps=100, batch_size=6)
    sweep = tv.layer_sweep(model, queries, vectors)
    assert (sweep.accuracy[:3] == 1).all()
    assert (sweep.accuracy[3:] <= 1 / 6 + 1e-6).all()
    # Begun at the means, which do the task, training has nothing to change.
    means = tv.task_vectors(tv.collect(model, few_shot))
    kept = tv.vectors.learn_vectors(model, queries, start=means, steps=5, rate=1e-3)
    for layer in planted.WORKS:
        assert (kept.at(layer) - means.at(layer)).norm() < 1e-2 * means.at(layer).norm()


def test_a_learned_vector_does_the_toy_models_tasks() -> None:
    model = tv.load_model("toy")
    tasks = tv.find_tasks(["XOR", "NOR"])
    sets = tv.sample_splits(tasks, {"train": 20, "test": 20}, n_shots=4, seed=0)
    vectors = tv.vectors.learn_vectors(model, tv.zero_shot(sets["train"]), layers=[0, 1, 3])
    sweep = tv.layer_sweep(model, tv.zero_shot(sets["test"]), vectors)
    assert (sweep.at(1) > 0.9).all()
    # The mean of few-shot prompts does not work at layer 0, a trained vector does.
    means = tv.task_vectors(tv.collect(model, sets["train"]))
    assert (tv.layer_sweep(model, tv.zero_shot(sets["test"]), means).at(0) < 0.5).all()
    assert (sweep.at(0) > 0.8).all()
    assert (sweep.at(3) < 0.5).all()


def test_head_weights_follow_the_loss(tokenizer: Any) -> None:
    """The gradient is that of finite differences, and the vectors are the weighted heads."""
    model = zoo.bridge("llama", tokenizer)
    [task] = tv.find_tasks(["singular_plural"]).values()
    clean = tv.sample_episodes([task], n=6, n_shots=3, seed=0)
    found = tv.vectors.learn_head_weights(model, clean, steps=0, seed=5)
    assert found.layers == (None,)
    z = tv.collect(model, clean, hook="z").values.mean(dim=0)
    outputs = torch.stack(
        [
            torch.einsum("hd,hdm->hm", z[layer], model.blocks[layer].attn.W_O.detach())
            for layer in range(3)
        ]
    )
    by_hand = torch.einsum("lh,lhm->lm", found.weights[0], outputs)
    torch.testing.assert_close(found.joint.vectors.values[0], by_hand, atol=1e-5, rtol=1e-5)

    weights = found.weights[0].double()
    trained_on = tv.shuffle_labels(clean, seed=5)
    edits = found.inject(task.name, None)
    assert [edit.layer for edit in edits] == [0, 1, 2]

    def loss(of: torch.Tensor) -> float:
        vectors = torch.einsum("lh,lhm->lm", of.float(), outputs)
        some = [altered(edit, vector=v) for edit, v in zip(edits, vectors, strict=True)]
        return tv.evaluate(model, trained_on, some).loss.double().mean().item()

    def variants(parameter: torch.Tensor) -> Any:
        vectors = torch.einsum("lh,lhm->lm", parameter, outputs)
        return [[altered(edit, vector=v) for edit, v in zip(edits, vectors, strict=True)]]

    with trials(model, [trained_on]) as [trial]:
        start = found.weights[0].clone().requires_grad_()
        total = trial.losses(variants(start)).mean()
        (gradient,) = torch.autograd.grad(total, [start])
    for place in ((0, 0), (1, 2), (2, 3)):
        step = torch.zeros_like(weights)
        step[place] = 0.05
        slope = (loss(weights + step) - loss(weights - step)) / 0.1
        assert slope == pytest.approx(float(gradient[place]), abs=2e-3)


def test_learned_head_weights_lower_the_loss_of_queries_that_are_new() -> None:
    model = tv.load_model("toy")
    tasks = tv.find_tasks(["OR", "NOR"])
    sets = tv.sample_splits(tasks, {"train": 20, "test": 20}, n_shots=4, seed=0)
    vectors = tv.vectors.learn_head_weights(model, sets["train"], steps=60)
    test = tv.zero_shot(sets["test"])
    sweep = tv.layer_sweep(model, test, vectors)
    assert (sweep.mean_loss[0] < tv.evaluate(model, test).mean_loss - 0.5).all()


def test_the_lab_learns_too() -> None:
    """Vectors and head weights are trained against the squared error of a model of numbers."""
    model = lab.shipped_run().model()
    episodes = lab.problem_episodes(lab.SparseLinearMixture.small(), n=8, n_shots=3, seed=1)
    with trials(model, [episodes]) as [trial]:
        found = trial.losses([[], [tv.ablate(0)]])
    plain, ablated = tv.evaluate_many(model, episodes, [[], [tv.ablate(0)]])
    expected = torch.stack([plain.loss, ablated.loss], dim=1)
    torch.testing.assert_close(found.detach(), expected.float(), atol=1e-4, rtol=1e-4)
    vectors = tv.vectors.learn_vectors(model, episodes, layers=[0, 1], steps=30)
    sweep = tv.layer_sweep(model, episodes, vectors)
    assert (sweep.mean_loss < tv.evaluate(model, episodes).mean_loss).all()
    weights = tv.vectors.learn_head_weights(model, episodes, on=episodes, steps=30)
    joint = tv.layer_sweep(model, episodes, weights)
    assert float(joint.mean_loss.mean()) < tv.evaluate(model, episodes).mean_loss


@pytest.mark.model
def test_mistakes_are_named(model: Any, episodes: list[tv.Episode]) -> None:
    with pytest.raises(ValueError, match="mode is 'project'"):
        tv.vectors.learn_vectors(model, episodes, mode="project")
    with pytest.raises(ValueError, match="rate 0"):
        tv.vectors.learn_vectors(model, episodes, rate=0.0)
    means = tv.task_vectors(tv.collect(model, episodes))
    with pytest.raises(ValueError, match="start is of hook 'resid_post' and mode 'replace'"):
        tv.vectors.learn_vectors(model, episodes, mode="add", start=means)
    with pytest.raises(ValueError, match="use a lower rate"):
        descend(
            model,
            episodes[:2],
            torch.full((32,), 1e30),
            lambda vector: (
                [[tv.inject(torch.zeros(32), 0)]]
                if not vector.isfinite().all()
                else [[altered(tv.inject(torch.zeros(32), 0, mode="add"), vector=vector * 1e30)]]
            ),
            steps=2,
            batch_size=2,
            rate=1.0,
        )
    name, hook = "blocks.0.hook_resid_post", lambda activation, hook: activation
    with (
        model.hooks(fwd_hooks=[(name, hook)]),
        pytest.raises(ValueError, match="carries hooks of yours"),
    ):
        tv.vectors.learn_vectors(model, episodes, steps=1)


def test_weighted_heads_carry_a_model_of_the_lab_beyond_its_lengths() -> None:
    """Trained four points beyond, they help eight beyond; trained on other answers, they do not."""
    run = lab.shipped_run()
    problem = replace(run.config.problem, n_points=24)
    model = lab.lengthened(run.model(), 24)
    batch = problem.sample(3, torch.Generator().manual_seed(0))
    there = model(batch.xs[:, :16], batch.ys[:, :16])
    torch.testing.assert_close(there, run.model()(batch.xs[:, :16], batch.ys[:, :16]))
    with pytest.raises(ValueError, match="n_points is 23, and the model takes 24"):
        lab.lengthened(model, 23)

    def of_one_task(n: int, n_shots: int, seed: int) -> list[lab.LabEpisode]:
        return lab.problem_episodes(problem, n, n_shots, seed)[:n]

    clean, on, test = of_one_task(30, 15, 1), of_one_task(60, 19, 2), of_one_task(100, 23, 3)
    options: dict[str, Any] = {"steps": 40, "batch_size": 30, "rate": 0.1}
    wrong = [replace(one, target=-one.target) for one in on]
    learn = tv.vectors.learn_head_weights
    found = [learn(model, clean, on=some, **options) for some in (on, wrong)]
    plain, own, other = tv.evaluate_many(model, test, [[], *(v.inject("B1") for v in found)])
    assert own.mean_loss < 0.85 * plain.mean_loss < other.mean_loss
