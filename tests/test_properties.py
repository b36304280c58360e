"""What holds of every intervention and every public function, whatever it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.activations import Source
from transformer_lens_taskvec.analysis.pooling import input_embeddings

pytestmark = pytest.mark.filterwarnings("ignore:.*one intervention at a time")

TASKS = {name: task for name, task in tv.bitwise_tasks().items() if name in ("AND", "OR", "Null")}
HOOKS = ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
EXAMPLES = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def drawn_vector(seed: int) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


@st.composite
def edits(draw: Any, hook: str | None = None, layer: int | None = None) -> tv.Intervention:
    hook = hook or draw(st.sampled_from(HOOKS))
    layer = draw(st.integers(0, 2)) if layer is None else layer
    vector = drawn_vector(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        return tv.ablate(layer, direction=vector, hook=hook)
    mode, scale = draw(st.sampled_from(["replace", "add"])), draw(st.floats(-2, 2))
    return tv.inject(vector, layer, mode=mode, scale=scale, hook=hook)


@pytest.fixture(scope="module")
def few() -> list[tv.Episode]:
    return tv.sample_episodes(TASKS, 2, 2, seed=3)


def close(first: tv.Scores, second: tv.Scores) -> None:
    torch.testing.assert_close(first.loss, second.loss, atol=1e-3, rtol=1e-4)


@pytest.mark.model
@EXAMPLES
@given(data=st.data(), hook=st.sampled_from(HOOKS), layer=st.integers(0, 2))
def test_edits_of_one_place_are_done_in_order(
    model: Any, few: list[tv.Episode], data: Any, hook: str, layer: int
) -> None:
    both = [data.draw(edits(hook, layer)) for _ in range(2)]

    def in_order(activation: torch.Tensor, hook: Any = None) -> torch.Tensor:
        for edit in both:
            activation = edit(activation)
        return activation

    prompt = model.tokenizer.encode(few[0].prompt, add_special_tokens=False)
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        apart = model.run_with_hooks(tokens, fwd_hooks=both)
        whole = model.run_with_hooks(tokens, fwd_hooks=[(both[0].name, in_order)])
    torch.testing.assert_close(apart, whole)
    first, *_ = model.tokenizer.encode(few[0].answer, add_special_tokens=False)
    one = dataclasses.replace(
        few[0], query=tv.Example(few[0].query.x, model.tokenizer.decode([first]))
    )
    nll = tv.evaluate(model, [one], both).loss[0]
    torch.testing.assert_close(nll, -whole[0, -1].log_softmax(-1)[first], atol=1e-3, rtol=1e-4)


@pytest.mark.model
@EXAMPLES
@given(data=st.data())
def test_edits_of_different_places_commute(model: Any, few: list[tv.Episode], data: Any) -> None:
    places = data.draw(
        st.lists(
            st.tuples(st.sampled_from(HOOKS), st.integers(0, 2)),
            min_size=2,
            max_size=3,
            unique=True,
        )
    )
    variant = [data.draw(edits(hook, layer)) for hook, layer in places]
    forth, back = tv.evaluate_many(model, few, [variant, variant[::-1]])
    # resid_post of a block is resid_pre of the next: one place with two names, where order counts.
    numbered = {3 * layer + 3 * (hook == "resid_post") for hook, layer in places}
    if len(numbered) == len(places) or not any(hook == "resid_post" for hook, _ in places):
        close(forth, back)


@pytest.mark.model
@EXAMPLES
@given(hook=st.sampled_from(HOOKS), layer=st.integers(0, 2), seed=st.integers(0, 99))
def test_a_vector_added_and_taken_off_changes_nothing(
    model: Any, few: list[tv.Episode], hook: str, layer: int, seed: int
) -> None:
    variant = [
        tv.inject(drawn_vector(seed), layer, mode="add", scale=scale, hook=hook)
        for scale in (1.0, -1.0)
    ]
    plain, there_and_back = tv.evaluate_many(model, few, [[], variant])
    close(plain, there_and_back)


@pytest.mark.model
@EXAMPLES
@given(order=st.permutations(range(6)), batch_size=st.integers(1, 6))
def test_order_and_batches_change_no_number(
    model: Any, few: list[tv.Episode], order: list[int], batch_size: int
) -> None:
    longer = tv.sample_episodes(TASKS, 1, 4, seed=4)
    mixed = [*few[:3], *longer]
    found = tv.collect(model, mixed)
    again = tv.collect(model, [mixed[i] for i in order], batch_size=batch_size)
    torch.testing.assert_close(again.values, found.values[order], atol=1e-4, rtol=1e-4)
    assert [again.tasks[i] for i in again.labels] == [mixed[i].task for i in order]
    edit = [tv.inject(drawn_vector(0), 1)]
    scores = tv.evaluate(model, mixed, edit)
    shuffled = tv.evaluate(model, [mixed[i] for i in order], edit, max_tokens=40 * batch_size)
    torch.testing.assert_close(shuffled.loss, scores.loss[order], atol=1e-4, rtol=1e-4)
    assert shuffled.correct.equal(scores.correct[order])


@EXAMPLES
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 8)),
    names=st.lists(st.text(min_size=1), min_size=4, max_size=4, unique=True),
    seed=st.integers(0, 99),
    bos=st.booleans(),
)
def test_saved_vectors_are_the_vectors(
    tmp_path: Path, shape: tuple[int, int, int], names: list[str], seed: int, bos: bool
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    source = Source(names[0], "resid_mid", -2, names[1], bos)
    layers = tuple(range(5, 5 + shape[1]))
    vectors = tv.TaskVectors(values, tuple(names[: shape[0]]), layers, source)
    vectors.save(tmp_path / "v.safetensors")
    loaded = tv.TaskVectors.load(tmp_path / "v.safetensors")
    assert torch.equal(loaded.values, values)
    assert (loaded.tasks, loaded.layers, loaded.source) == (vectors.tasks, layers, source)


@EXAMPLES
@given(order=st.permutations(range(12)), seed=st.integers(0, 99))
def test_permuting_points_permutes_hits(order: list[int], seed: int) -> None:
    values = torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(12) % 3
    source = Source("made", "resid_post", -1, "{x}{y}", False)
    found = tv.Activations(values, labels, ("a", "b", "c"), (0, 1), source)
    shuffled = dataclasses.replace(found, values=values[order], labels=labels[order])
    for method in ("knn", "centroid"):
        hits, again = (tv.task_decodability(a, 3, method=method).hits for a in (found, shuffled))
        assert torch.equal(hits[:, order], again)


def public(model: Any, few: list[tv.Episode], vectors: tv.TaskVectors) -> dict[str, Callable]:
    """Every public function that runs a model, on small arguments."""
    study: dict[str, Any] = {"n": 6, "k": 3}
    return {
        "collect": lambda: tv.collect(model, few),
        "evaluate_many": lambda: tv.evaluate_many(model, few, [[]], observe=tv.Observe()),
        "evaluate": lambda: tv.evaluate(model, few, [tv.inject(drawn_vector(0), 1)]),
        "evaluate, every position": lambda: tv.evaluate(model, few, [tv.ablate(1, position=None)]),
        "generate": lambda: tv.generate(
            model, [few[0].prompt], [tv.inject(drawn_vector(0), 1)], max_new_tokens=2
        ),
        "layer_sweep": lambda: tv.layer_sweep(model, few, vectors, controls=True),
        "perturbation_matrix": lambda: tv.perturbation_matrix(model, few, vectors, 1),
        "steering_effect": lambda: tv.steering_effect(model, few, vectors, 1),
        "head_effects": lambda: tv.head_effects(model, few),
        "function_vectors": lambda: tv.function_vectors(model, few, n_heads=2),
        "controls": lambda: tv.control_vectors(vectors, model, few),
        "input_embeddings": lambda: input_embeddings(model, few),
        "run_study": lambda: tv.paper.run_study(model, TASKS, shots=(1, 2), **study),
        "run_experiment": lambda: tv.run_experiment(model, TASKS, n_shots=1, **study),
        "prompting_study": lambda: tv.paper.prompting_study(
            model, TASKS, tv.paper.BITWISE_INSTRUCTIONS, n_shots=1, **study
        ),
    }


def failing(
    forward: Callable[..., Any], passes: list[int], at: int, failure: type[BaseException] | None
) -> Callable[..., Any]:
    """A module's forward that counts passes, and raises in one of them.

    It is not a hook, under which models run otherwise.
    """

    def fail(activation: Any) -> Any:
        passes.append(1)
        if failure is not None and len(passes) == at:
            raise failure("in the middle")
        return forward(activation)

    return fail


NAMES = list(public(None, [], None))  # type: ignore[arg-type]


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
def test_a_model_is_left_as_it_was_found(
    model: Any, few: list[tv.Episode], name: str, failure: type[BaseException] | None
) -> None:
    vectors = tv.task_vectors(tv.collect(model, few))
    call = public(model, few, vectors)[name]
    before = [(p.dtype, p.device, p.requires_grad, p._version) for p in model.parameters()]
    rng = torch.get_rng_state()
    for failing_pass in (1, 2):
        passes: list[int] = []
        point = model.hook_dict["blocks.0.hook_resid_pre"]
        point.forward = failing(point.forward, passes, failing_pass, failure)
        model.train()
        raised = False
        try:
            call()
        except (RuntimeError, KeyboardInterrupt) as error:
            raised = str(error) == "in the middle"
        finally:
            del point.forward
            left_in_training = model.training
            model.eval()
        assert raised == (failure is not None and len(passes) == failing_pass)
        assert len(passes) >= 1 and left_in_training and torch.is_grad_enabled()
        assert all(not point.has_hooks() for point in model.hook_dict.values())
        after = [(p.dtype, p.device, p.requires_grad, p._version) for p in model.parameters()]
        assert after == before
        assert torch.equal(torch.get_rng_state(), rng)
