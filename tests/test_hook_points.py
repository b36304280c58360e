"""Every hook point of a block is edited and read at the position asked for, or refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.layouts import position_shapes

pytestmark = pytest.mark.filterwarnings("ignore:.*one intervention at a time")
KINDS = ["llama", "gpt2", "gpt_neox", "gemma2", "opt"]
BY_HEAD = ["pattern", "attn_scores", "attn.hook_pattern"]


def moe(tokenizer: Any, family: str, **changes: Any) -> Any:
    """A small model with a mixture of experts."""
    sizes = {**zoo.SIZES, "num_key_value_heads": 2, "head_dim": 8, **changes}
    config = getattr(transformers, f"{family}Config")(**sizes)
    config.architectures = [f"{family}ForCausalLM"]
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf_model = getattr(transformers, config.architectures[0])(config)
    return tv.bridge_from_hf(hf_model, tokenizer, device="cpu")


def tokens_of(model: Any, episode: tv.Episode) -> torch.Tensor:
    return torch.tensor([model.tokenizer.encode(episode.prompt, add_special_tokens=False)])


def hooks_of(model: Any) -> list[str]:
    """The hook points of block 1, each tensor by one name."""
    names = {id(p): name for name, p in model.hook_dict.items() if name.startswith("blocks.1.")}
    return [name.removeprefix("blocks.1.") for name in names.values()]


def refused(model: Any, hook: str) -> bool:
    try:
        position_shapes(model, [f"blocks.1.{hook}"])
    except ValueError as error:
        assert any(text in str(error) for text in ("no position", "not run", "is False")), error
        return True
    return False


def shapes_alone(model: Any, hook: str) -> list[tuple[int, ...]]:
    """The shapes of an activation for 2 prompts of 7 tokens and 3 of 9."""
    seen: list[tuple[int, ...]] = []

    def note(activation: torch.Tensor, hook: Any) -> None:
        seen.append(tuple(activation.shape))

    with torch.no_grad():
        for shape in ((2, 7), (3, 9)):
            tokens = torch.arange(shape[0] * shape[1]).view(shape)
            model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.{hook}", note)])
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_each_hook_point_is_read_and_edited_at_the_last_token_or_refused(
    kind: str, tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    model, few = zoo.bridge(kind, tokenizer), [episodes[0], episodes[-1]]
    baseline = tv.evaluate(model, few)
    accepted = []
    for hook in hooks_of(model):
        if refused(model, hook):
            try:
                shapes = shapes_alone(model, hook)
            except ValueError as error:  # TransformerLens wants a switch set first
                assert "is False" in str(error)
                continue
            assert [shape[:2] for shape in shapes] != [(2, 7), (3, 9)], hook
            for call in (
                lambda hook=hook: tv.collect(model, few, hook=hook, layers=[1]),
                lambda hook=hook: tv.evaluate_many(model, few, [[]], observe=tv.Observe(hook, [1])),
                lambda hook=hook: tv.evaluate(model, few, [tv.ablate(1, hook=hook)]),
            ):
                with pytest.raises(ValueError, match=r"hook|switch"):
                    call()
        else:
            accepted.append(hook)
    accepted = [hook for hook in accepted if not hook.endswith("hook_scale")]  # a divisor
    assert len(accepted) >= 20
    variants = [[], *([tv.ablate(1, hook=hook)] for hook in accepted)]
    with warnings.catch_warnings():
        if capabilities(model).packs:
            warnings.filterwarnings("error", message=".*one intervention at a time")
        plain, *found = tv.evaluate_many(model, few, variants)
    torch.testing.assert_close(plain.loss, baseline.loss, atol=1e-3, rtol=1e-4)
    for hook, scores in zip(accepted, found, strict=True):
        values = tv.collect(model, few, hook=hook, layers=[1]).values[:, 0]
        for row, episode in enumerate(few):
            prompt = tokens_of(model, episode)
            answer = model.tokenizer.encode(episode.answer, add_special_tokens=False)
            last = prompt.shape[1] - 1
            read: list[torch.Tensor] = []

            def edit(
                activation: torch.Tensor, hook: Any, last: int = last, read: Any = read
            ) -> torch.Tensor:
                read.append(activation[0, last].clone())
                edited = activation.clone()
                edited[:, last] = 0
                return edited

            with torch.no_grad():
                whole = torch.cat([prompt, torch.tensor([answer])], dim=1)
                logits = model.run_with_hooks(whole, fwd_hooks=[(f"blocks.1.{hook}", edit)])
            expected = -logits[0, last:-1].log_softmax(-1)[range(len(answer)), answer].sum()
            torch.testing.assert_close(scores.loss[row], expected, atol=2e-3, rtol=1e-3, msg=hook)
            torch.testing.assert_close(values[row], read[0], atol=1e-3, rtol=1e-3, msg=hook)


@pytest.mark.model
@pytest.mark.parametrize("max_tokens", [None, 60])
def test_an_intervention_that_divides_by_zero_reaches_no_other_variant(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors, max_tokens: int | None
) -> None:
    broken = [tv.ablate(0, hook="ln2.hook_scale")]
    finite = [[], vectors.inject("en_fr", 1), [tv.ablate(2)]]
    expected = tv.evaluate_many(model, episodes, finite)
    variants = [finite[0], broken, *finite[1:]]
    observed, [plain, nan, *found] = tv.evaluate_many(
        model, episodes, variants, observe=tv.Observe("z"), max_tokens=max_tokens
    )
    assert nan.loss.isnan().all()
    for one, other in zip([plain, *found], expected, strict=True):
        torch.testing.assert_close(one.loss, other.loss, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(
        observed.values, tv.collect(model, episodes, hook="z").values, atol=1e-4, rtol=1e-4
    )


def test_an_intervention_that_divides_by_zero_is_warned_about(
    tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    variants = [[], [tv.ablate(0, hook="ln2.hook_scale")]]
    with pytest.warns(UserWarning, match="an intervention makes activations infinite or NaN"):
        tv.evaluate_many(zoo.bridge("llama", tokenizer), episodes, variants)


@pytest.mark.model
@pytest.mark.parametrize("hook", BY_HEAD)
def test_attention_patterns_are_refused_with_another_way(
    model: Any, episodes: list[tv.Episode], hook: str
) -> None:
    with pytest.raises(ValueError, match=r"hook is '.*[(]hook='z', head=...[)]"):
        tv.ablate(1, hook=hook)
    name = "blocks.1.attn.hook_" + hook.removeprefix("attn.hook_")
    for call in (
        lambda: tv.collect(model, episodes, hook=hook, position=2),
        lambda: tv.evaluate_many(model, episodes, [[]], observe=tv.Observe(hook, [1])),
    ):
        with pytest.raises(ValueError, match=r"no position as its second axis.*run_with_cache"):
            call()
    with pytest.raises(ValueError, match=rf"{name}.*\(2, 4, 5, 5\)"):
        position_shapes(model, [name])


@pytest.mark.parametrize(("family", "router"), [("Mixtral", "mlp.gate"), ("GptOss", "mlp.router")])
def test_a_router_that_merges_prompts_and_positions_is_refused(
    family: str, router: str, tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    model = moe(tokenizer, family, num_local_experts=3, num_experts_per_tok=2)
    hook = f"{router}.hook_expert_weights"
    for call in (
        lambda: tv.collect(model, episodes, hook=hook),
        lambda: tv.evaluate(model, episodes, [tv.ablate(1, hook=hook)]),
        lambda: tv.generate(model, ["a"], [tv.ablate(1, hook=hook)], max_new_tokens=1),
    ):
        with pytest.raises(ValueError, match=r"no position .* is \(10, 3\)"):
            call()


def test_queries_are_found_where_a_norm_follows_the_split_into_heads(
    tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    """Qwen3's normalised queries are [batch, head, pos, d], those before are [batch, pos, ...]."""
    model = moe(tokenizer, "Qwen3")
    names = ["blocks.1.attn.hook_q", "blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_rot_k"]
    assert list(position_shapes(model, names).values()) == [(4, 8), (4, 8), (2, 8)]
    with pytest.raises(ValueError, match=r"no position .* is \(2, 4, 5, 8\)"):
        tv.collect(model, episodes, hook="attn.q_norm.hook_out")


@pytest.mark.model
def test_a_hook_point_that_does_not_run_is_refused_until_it_is_switched_on(
    tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    model = (
        zoo.bridge("llama", tokenizer)
        if zoo.HookedTransformer is None
        else zoo.hooked_transformer(zoo.hf_model("llama"), tokenizer, "tiny-llama")
    )
    edit = tv.ablate(1, hook="result", head=2)
    with pytest.raises(ValueError, match=r"set_use_attn_result\(True\)"):
        tv.evaluate(model, episodes, [edit])
    model.set_use_attn_result(True)
    same = tv.evaluate(model, episodes, [tv.ablate(1, hook="z", head=2)])
    found = tv.evaluate(model, episodes, [edit])
    torch.testing.assert_close(found.loss, same.loss, atol=1e-3, rtol=1e-4)
    assert tv.collect(model, episodes[:1], hook="result").values.shape == (1, 3, 4, 32)
    model.set_use_attn_result(False)
    with pytest.raises(ValueError, match=r"set_use_attn_result\(True\)"):
        tv.collect(model, episodes, hook="result")


@pytest.mark.model
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (tv.ablate(1, head=0), r"head is 0, but blocks.1.hook_resid_post .*no axis of heads"),
        (tv.ablate(1, hook="post", head=1), "head is 1, but .*hook_post.*no axis of heads"),
        (tv.ablate(1, hook="k", head=2), "head 2 is out of range: .* has heads 0 to 1 at .*hook_k"),
        (tv.ablate(1, hook="v", head=3), "head 3 is out of range: .* has heads 0 to 1 at"),
        (tv.ablate(1, hook="z", head=4), "head 4 is out of range: .* has heads 0 to 3"),
        (tv.inject(torch.ones(32), 1, hook="z"), "has width 32, and the activation of .* has 8"),
        (tv.inject(torch.ones(8), 1, hook="post"), "has width 8, and the activation of .* has 64"),
        (tv.inject(torch.ones(1), 1), "has width 1, and the activation of .* has 32"),
        (tv.inject(torch.ones(2), 1, hook="ln2.hook_scale"), "has width 2, and .* has 1"),
    ],
)
def test_heads_and_widths_are_those_of_the_hook_point(
    model: Any, episodes: list[tv.Episode], edit: tv.Intervention, message: str
) -> None:
    calls: list[int] = []

    def count(activation: torch.Tensor, hook: Any) -> None:
        calls.append(1)

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", count)]):
        for call in (
            lambda: tv.evaluate(model, episodes, [edit]),
            lambda: tv.generate(model, ["a b"], [edit], max_new_tokens=1),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    assert not calls


@pytest.mark.model
def test_finding_shapes_leaves_the_models_own_hooks_alone(tokenizer: Any) -> None:
    model = zoo.bridge("llama", tokenizer)
    tokens, calls = torch.arange(12)[None], []

    def twentieth(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        calls.append(activation[:, 10])  # not there in a short prompt
        return 2 * activation

    name = "blocks.1.hook_resid_pre"
    model.train()
    with model.hooks(fwd_hooks=[(name, twentieth)]), torch.no_grad():
        before = model(tokens)
        assert position_shapes(model, [name, "blocks.0.attn.hook_z"]) == {
            name: (32,),
            "blocks.0.attn.hook_z": (4, 8),
        }
        assert len(calls) == 1
        assert torch.equal(model(tokens), before)
        assert len(calls) == 2
    assert model.training
    assert all(not point.has_hooks() for point in model.hook_dict.values())


def test_layers_of_different_widths_are_collected_one_at_a_time(
    tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    hf_model = zoo.hf_model("llama")
    hf_model.model.layers[2].mlp = zoo.hf_model("llama", intermediate_size=48).model.layers[2].mlp
    model = tv.bridge_from_hf(hf_model, tokenizer, device="cpu")
    for call in (
        lambda: tv.collect(model, episodes, hook="post"),
        lambda: tv.evaluate_many(model, episodes, [[]], observe=tv.Observe("post")),
    ):
        with pytest.raises(
            ValueError, match=r"layers have activations of different shapes at 'pos"
        ):
            call()
    widths = [tv.collect(model, episodes, hook="post", layers=[i]).values.shape[2] for i in (0, 2)]
    assert widths == [64, 48]
    tv.evaluate(model, episodes, [tv.inject(torch.ones(48), 2, hook="post")])
    with pytest.raises(ValueError, match="has width 48, and the activation of .* has 64"):
        tv.evaluate(model, episodes, [tv.inject(torch.ones(48), 1, hook="post")])


def test_models_of_the_lab_are_asked_too() -> None:
    model = lab.shipped_run().model()
    episodes = lab.problem_episodes(lab.SparseLinearMixture.small(), n=3, n_shots=4)
    with pytest.raises(ValueError, match="no position as its second axis"):
        tv.collect(model, episodes, hook="pattern")
    with pytest.raises(ValueError, match="no axis of heads"):
        tv.evaluate(model, episodes, [tv.ablate(1, head=0)])
    assert tv.collect(model, episodes, hook="z").values.ndim == 4


def test_a_recurrent_model_is_asked_too(tokenizer: Any, episodes: list[tv.Episode]) -> None:
    model = zoo.bridge("mamba", tokenizer)
    with pytest.raises(ValueError, match="does not run"):
        tv.collect(model, episodes, hook="mixer.conv1d.hook_out")
    assert tv.collect(model, episodes, hook="mixer.in_proj.hook_out").values.shape[2:] == (128,)


@pytest.mark.parametrize("position", [1.5, True, "last", [], [-1], None])
@pytest.mark.usefixtures("unchecked")
def test_activations_are_collected_at_one_whole_position(
    position: Any, model: Any, episodes: list[tv.Episode]
) -> None:
    with pytest.raises(ValueError, match="position is"):
        tv.collect(model, episodes, position=position)
