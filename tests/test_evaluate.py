from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.interventions.packed import answer_logits
from transformer_lens_taskvec.models.capabilities import capabilities
from transformer_lens_taskvec.models.protocol import inference
from transformer_lens_taskvec.models.tokens import encode, encode_answers

ARCHITECTURES = ["llama", "qwen2", "gpt2", "gpt_neox", "gemma2", "opt"]


def one_run_each(model: Any, episodes: list[tv.Episode], variant: list[Any]) -> list[torch.Tensor]:
    """Logits of each answer's tokens: one unpadded prompt at a time, by ``run_with_hooks``."""
    found = []
    for episode in episodes:
        prompt = model.tokenizer.encode(episode.prompt, add_special_tokens=False)
        answer = model.tokenizer.encode(episode.answer, add_special_tokens=False)
        at = len(prompt) - 1

        def hook(intervention: Any, n: int = len(prompt)) -> Any:
            position = intervention.position

            def edit(activation: torch.Tensor, hook: Any) -> torch.Tensor:
                edited = activation.clone()
                for place in (position,) if isinstance(position, int) else position:
                    edited[:, n + place] = intervention.edit(activation[:, n + place])
                return edited

            return intervention.name, edit

        with torch.no_grad():
            logits = model.run_with_hooks(
                torch.tensor([prompt + answer]), fwd_hooks=[hook(i) for i in variant]
            )
        found.append(logits[0, at : at + len(answer)])
    return found


def in_the_engine(
    model: Any, episodes: list[tv.Episode], variants: list[Any], **options: Any
) -> dict[tuple[int, int], torch.Tensor]:
    prompts = encode(model, [episode.prompt for episode in episodes])
    answers = encode_answers(model, episodes)
    found = {}
    with inference(model):
        for chunk in answer_logits(model, prompts, answers, variants, **options):
            for i, row in enumerate(chunk.rows):
                for j, variant in enumerate(chunk.variants):
                    assert (row, variant) not in found
                    found[row, variant] = chunk.logits[i, j, : len(answers[row])]
    return found


def variants_for(model: Any, vectors: tv.TaskVectors) -> list[list[Any]]:
    vector, other = vectors["en_fr", 1], vectors["upper_case", 2]
    return [
        [],
        [tv.inject(vector, 0)],
        [tv.inject(vector, 2, mode="add", scale=3.0)],
        [tv.inject(vector, 1, hook="mlp_out"), tv.inject(other, 1, mode=lambda a, v: a - v)],
        [tv.ablate(2, hook="attn_out"), tv.inject(other, 0, hook="resid_pre", mode="add")],
        [tv.ablate(1, direction=other)],
        [tv.ablate(1, hook="z", head=2)],
        [tv.inject(vector, 1, position=-2), tv.ablate(0, position=(-1, -3))],
    ]


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
@pytest.mark.parametrize("max_tokens", [None, 40])
def test_the_engine_gives_the_logits_of_one_run_for_each_prompt_and_variant(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors, max_tokens: int | None
) -> None:
    variants = variants_for(model, vectors)
    found = in_the_engine(model, episodes, variants, max_tokens=max_tokens)
    assert len(found) == len(episodes) * len(variants)
    for index, variant in enumerate(variants):
        for row, expected in enumerate(one_run_each(model, episodes, variant)):
            torch.testing.assert_close(found[row, index], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_packs_with_the_logits_of_one_run_each(
    kind: str, tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    model = zoo.bridge(kind, tokenizer)
    assert capabilities(model).packs, capabilities(model).reason
    vectors = tv.task_vectors(tv.collect(model, episodes))
    variants: list[list[Any]] = [[], *([tv.inject(vectors["en_fr", i], i)] for i in range(3))]
    found = in_the_engine(model, episodes, variants)
    for index, variant in enumerate(variants):
        for row, expected in enumerate(one_run_each(model, episodes, variant)):
            torch.testing.assert_close(found[row, index], expected, atol=1e-4, rtol=1e-4)


def test_a_recurrent_model_runs_plainly_with_one_warning_and_the_same_logits(
    tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    model = zoo.bridge("mamba", tokenizer)
    vectors = tv.task_vectors(tv.collect(model, episodes))
    variants = [[], [tv.inject(vectors["en_fr", 1], 1)]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        found = in_the_engine(model, episodes, variants)
    assert len(caught) == 1
    assert "tiny-mamba runs one intervention at a time" in str(caught[0].message)
    for index, variant in enumerate(variants):
        for row, expected in enumerate(one_run_each(model, episodes, variant)):
            torch.testing.assert_close(found[row, index], expected, atol=1e-4, rtol=1e-4)


def test_prompts_longer_than_a_sliding_window_run_plainly(
    tokenizer: Any, episodes: list[tv.Episode]
) -> None:
    model = zoo.bridge("gemma2", tokenizer, sliding_window=8)
    assert capabilities(model).apart == 8
    with pytest.warns(UserWarning, match="longer than its sliding_window of 8 tokens"):
        found = in_the_engine(model, episodes, [[], [tv.ablate(1, hook="mlp_out", position=-1)]])
    for row, expected in enumerate(one_run_each(model, episodes, [])):
        torch.testing.assert_close(found[row, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.model
@pytest.mark.parametrize("position", [0, (-2, -1), None])
def test_other_positions_give_the_numbers_of_whole_runs(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors, position: Any
) -> None:
    episode = episodes[0]
    intervention = tv.inject(vectors["en_fr", 1], 1, mode="add", position=position)
    prompt = model.tokenizer.encode(episode.prompt, add_special_tokens=False)
    answer = model.tokenizer.encode(episode.answer, add_special_tokens=False)
    at = {0: [0], (-2, -1): [len(prompt) - 2, len(prompt) - 1], None: None}[position]

    def edit(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        edited = activation.clone()
        edited[:, at if at is not None else slice(None)] += intervention.vector
        return edited

    with torch.no_grad():
        logits = model.run_with_hooks(
            torch.tensor([prompt + answer]), fwd_hooks=[(intervention.name, edit)]
        )[0, len(prompt) - 1 : -1]
    expected = -logits.log_softmax(-1)[range(len(answer)), answer].sum()
    scores = tv.evaluate(model, episodes, [intervention])
    torch.testing.assert_close(scores.loss[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.model
def test_any_pair_of_a_hook_name_and_a_function_is_an_intervention(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    vector = vectors["en_fr", 1]

    def add_everywhere(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation + vector

    pair = tv.evaluate(model, episodes, [("blocks.1.hook_resid_post", add_everywhere)])
    same = tv.evaluate(model, episodes, [tv.inject(vector, 1, mode="add", position=None)])
    torch.testing.assert_close(pair.loss, same.loss, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("stop", [None, "separator"])
def test_exact_match_equals_the_text_of_a_real_greedy_generation(smollm2: Any, stop: Any) -> None:
    tasks = tv.find_tasks(["upper_case", "singular_plural", "next_letter", "capitalize"])
    episodes = tv.sample_episodes(tasks, n=8, n_shots=4, seed=5)
    scores = tv.evaluate(smollm2, episodes, stop=stop)
    assert 0.2 < scores.accuracy < 1
    for episode, right in zip(episodes, scores.correct.tolist(), strict=True):
        wanted = smollm2.tokenizer.encode(episode.answer, add_special_tokens=False)
        if stop:
            wanted += smollm2.tokenizer.encode(episode.separator, add_special_tokens=False)
        tokens = torch.tensor([smollm2.tokenizer.encode(episode.prompt, add_special_tokens=False)])
        out = smollm2.original_model.generate(
            tokens, max_new_tokens=len(wanted), do_sample=False, eos_token_id=-1, pad_token_id=2
        )
        assert right == (out[0, tokens.shape[1] :].tolist() == wanted), episode.prompt


@pytest.mark.model
def test_permuting_episodes_permutes_scores(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    variant = [tv.inject(vectors["en_fr", 1], 1)]
    order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(0)).tolist()
    scores = tv.evaluate(model, episodes, variant)
    shuffled = tv.evaluate(model, [episodes[index] for index in order], variant)
    torch.testing.assert_close(shuffled.loss, scores.loss[order], atol=1e-4, rtol=1e-5)


@pytest.mark.model
def test_scores_are_grouped_by_task(model: Any, episodes: list[tv.Episode]) -> None:
    scores = tv.evaluate(model, episodes)
    frame = scores.to_frame()
    assert list(frame.task) == [episode.task for episode in episodes]
    for task in scores.tasks:
        own = scores.of(task)
        assert len(own) == sum(episode.task == task for episode in episodes)
        assert own.mean_loss == pytest.approx(frame[frame.task == task].loss.mean(), rel=1e-5)
    assert scores.by_task().keys() == set(scores.tasks)
    assert "n = 7 queries per task" in repr(scores)


@pytest.mark.model
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: [tv.inject(v["en_fr", 1], 3)], "layer 3 is out of range"),
        (lambda v: [tv.inject(torch.ones(31), 1)], "has width 31, and the activation of .* has 32"),
        (lambda v: [tv.inject(torch.ones(8), 1, hook="z", head=4)], "head 4 is out of range"),
        (lambda v: [tv.ablate(1, hook="resid_pots")], "no hook point"),
        (lambda v: [("blocks.9.hook_x", print)], "no hook point 'blocks.9.hook_x'"),
    ],
)
def test_interventions_without_a_place_in_the_model_are_refused(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors, make: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tv.evaluate(model, episodes, make(vectors))


def test_an_answer_without_tokens_is_refused(model: Any) -> None:
    empty = tv.Episode("t", (), tv.Example("x", ""))
    with pytest.raises(ValueError, match="answer '' of task 't' has no tokens"):
        tv.evaluate(model, [empty])


def test_a_stop_of_another_kind_is_refused(model: Any, episodes: list[tv.Episode]) -> None:
    with pytest.raises(ValueError, match="stop is 'newline'"):
        tv.evaluate(model, episodes, stop="newline")


def test_a_tokenizer_without_a_pad_token_serves(tokenizer: Any, episodes: list[tv.Episode]) -> None:
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    model = zoo.bridge("llama", tokenizer)
    expected = tv.evaluate(model, episodes)
    model.tokenizer = bare
    bare.pad_token = None
    torch.testing.assert_close(tv.evaluate(model, episodes).loss, expected.loss)
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        tv.evaluate(model, episodes)


def test_edits_behind_a_block_come_before_those_in_front_of_the_next(
    model: Any, episodes: list[tv.Episode], vectors: tv.TaskVectors
) -> None:
    vector = vectors["en_fr", 1]
    front = tv.inject(vector, 2, hook="resid_pre", mode="add")
    behind = tv.inject(2 * vector, 1, hook="resid_post")
    variants = [[], [front, behind], [behind, front], [behind], [front], [behind, behind, front]]
    found = in_the_engine(model, episodes[:3], variants)
    for index, variant in enumerate(variants):
        for row, expected in enumerate(one_run_each(model, episodes[:3], variant)):
            torch.testing.assert_close(found[row, index], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_two_names_of_one_hook_point_act_in_the_order_given(
    tokenizer: Any, episodes: list[tv.Episode], kind: str
) -> None:
    model = zoo.bridge(kind, tokenizer)
    one, two = torch.linspace(-1, 1, 32), torch.linspace(2, -1, 32)
    last = int(model.cfg.n_layers) - 1
    variants = [
        order
        for layer in (0, last)
        for before, after in (("resid_post", "hook_out"), ("hook_out", "resid_post"))
        for order in (
            [tv.inject(one, layer, hook=before), tv.inject(two, layer, hook=after, mode="add")],
            [
                tv.inject(two, layer, hook=before, mode="add"),
                tv.inject(one, layer, hook=after),
                tv.inject(one, layer, hook=before, mode="add"),
            ],
        )
    ]
    found = in_the_engine(model, episodes[:4], variants)
    for index, variant in enumerate(variants):
        for row, expected in enumerate(one_run_each(model, episodes[:4], variant)):
            torch.testing.assert_close(found[row, index], expected, atol=1e-4, rtol=1e-4)


def repeated(n: int = 40) -> list[tv.Episode]:
    """Episodes of eight queries, each in five prompts."""
    pairs = {letter: chr(ord(letter) + 1) for letter in "abcdefgh"}
    with pytest.warns(UserWarning, match="distinct inputs"):
        return tv.sample_episodes([tv.mapping_task("next", pairs)], n=n, n_shots=2, seed=0)


def test_the_interval_counts_distinct_queries() -> None:
    queries = torch.tensor([episode.query_id for episode in repeated()])
    right = torch.isin(queries, queries.unique()[:5])
    metrics = {"correct": right, "loss": torch.zeros(40)}
    scores = tv.Scores(metrics, torch.zeros(40, dtype=torch.long), ("next",), queries)
    assert scores.n_distinct == 8 and len(scores) == 40 and scores.accuracy == 5 / 8
    assert scores.interval() == pytest.approx((0.306, 0.863), abs=1e-3)
    assert "n = 8 queries (40 episodes)" in repr(scores)


def test_every_query_weighs_the_same_however_often_it_is_asked() -> None:
    queries = torch.tensor([5, 5, 5, 5, 9, -2])
    correct = torch.tensor([1, 1, 1, 0, 0, 0]).bool()
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    scores = tv.Scores({"correct": correct, "loss": correct.float()}, labels, ("a", "b"), queries)
    assert scores.accuracy == scores.mean_loss == 0.25
    assert scores.by_task() == {"a": 0.375, "b": 0.0}
    assert scores.of("a").n_distinct == 2 and scores.select(labels == 1).n_distinct == 1
    assert scores.size == "n = 1 to 2 queries (1 to 5 episodes) per task"


def test_a_query_is_the_same_with_other_demonstrations_and_another_template() -> None:
    query = tv.Example("a", "b")
    episode = tv.Episode("next", (tv.Example("c", "d"),), query)
    bare = tv.Episode("next", (), query, tv.PromptTemplate("{x} -> {y}"))
    assert episode.query_id == bare.query_id == 5777021099785882266  # in every process
    for other in (
        tv.Episode("last", (), query),
        tv.Episode("next", (), tv.Example("a", "c")),
        tv.Episode("next", (), tv.Example("b", "b")),
    ):
        assert other.query_id != episode.query_id


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*carries hooks of yours")
@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
def test_a_prompt_that_occurs_again_is_not_run_again(model: Any, vectors: tv.TaskVectors) -> None:
    bare = tv.zero_shot(repeated())
    variants = [[], vectors.inject("en_fr", 1), [tv.ablate(1, hook="mlp_out", position=0)]]
    rows: list[int] = []

    def count(activation: torch.Tensor, hook: Any) -> None:
        rows.append(len(activation))

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", count)]):
        once = tv.evaluate_many(model, bare[:8], variants)
        alone, rows[:] = sum(rows), []
        found, scores = tv.evaluate_many(model, bare, variants, observe=tv.Observe())
    assert sum(rows) == alone
    assert len({e.prompt for e in bare[:8]}) == 8 and all(len(one) == 40 for one in scores)
    for few, many in zip(once, scores, strict=True):
        torch.testing.assert_close(many.loss, few.loss.repeat(5))
        assert many.accuracy == few.accuracy and many.interval() == few.interval()
    expected = tv.collect(model, bare).values
    torch.testing.assert_close(found.values, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.model
def test_a_hook_of_the_callers_own_sees_every_episode(model: Any) -> None:
    rows: list[int] = []

    def by_row(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        rows.append(len(activation))
        scale = torch.arange(len(activation), dtype=activation.dtype)[:, None, None]
        return activation * (1 + scale)

    bare = tv.zero_shot(repeated(16))
    scores = tv.evaluate(model, bare, [("blocks.1.hook_resid_post", by_row)])
    assert sum(rows) == 16 and len(scores.loss.unique()) == 16


@pytest.mark.model
def test_the_same_prompt_with_another_answer_or_end_is_run_again(model: Any) -> None:
    asked = [
        tv.Episode("t", (), tv.Example("a", y), tv.PromptTemplate("{x}->{y}", separator=end))
        for y, end in (("b", "\n"), ("b", ";"), ("c", "\n"))
    ]
    assert len({episode.prompt for episode in asked}) == 1
    scores = tv.evaluate(model, asked, stop="separator")
    for episode, loss in zip(asked, scores.loss.tolist(), strict=True):
        alone = tv.evaluate(model, [episode], stop="separator")
        assert loss == pytest.approx(alone.mean_loss, abs=1e-4)
    assert len(scores.loss.unique()) == 3 and scores.n_distinct == 2


@pytest.mark.usefixtures("unchecked")
def test_interventions_from_a_generator_act(model: Any, episodes: list[tv.Episode]) -> None:
    listed = [tv.ablate(layer, hook="mlp_out") for layer in (0, 1)]
    expected = tv.evaluate(model, episodes, listed).loss
    once = tv.evaluate(model, episodes, (edit for edit in listed))
    (many,) = tv.evaluate_many(model, episodes, lambda task: iter([iter(listed)]))
    for found in (once, many):
        torch.testing.assert_close(found.loss, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, tv.evaluate(model, episodes).loss, atol=1e-2)


def test_an_intervention_in_a_pair_is_refused(model: Any, episodes: list[tv.Episode]) -> None:
    edit = tv.ablate(1)
    for name in (edit.name, "blocks.2.hook_resid_post"):
        with pytest.raises(ValueError, match="give the intervention itself"):
            tv.evaluate(model, episodes, [(name, edit)])


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*one intervention at a time")
def test_variants_may_share_an_intervention(model: Any, episodes: list[tv.Episode]) -> None:
    direction = torch.arange(32.0)
    halved = tv.inject(direction, 1, mode=lambda rows, vector: rows / 2 + vector, hook="mlp_out")
    removed = tv.ablate(1, direction=direction, hook="mlp_out")
    variants = [[removed], [removed, tv.ablate(2)], [halved], [tv.ablate(2), halved], [halved]]
    together = tv.evaluate_many(model, episodes, variants)
    for scores, variant in zip(together, variants, strict=True):
        alone = tv.evaluate(model, episodes, variant)
        torch.testing.assert_close(scores.loss, alone.loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("answer", ["cat", " cat", "dog", " 1 2", "\n", " ", "b:0a", "\u00e9"])
def test_an_answer_has_the_tokens_that_continue_its_prompt(answer: str) -> None:
    tokenizer = zoo.sentencepiece_tokenizer()
    model = SimpleNamespace(tokenizer=tokenizer)
    episode = tv.Episode("t", (), tv.Example("cat", answer), tv.PromptTemplate("{x}->{y}"))
    (prompt,) = encode(model, [episode.prompt], bos=False)
    (ids,) = encode_answers(model, [episode], stop="separator")
    whole = tokenizer(f"cat->{answer}\n", add_special_tokens=False)["input_ids"]
    assert prompt + ids == whole


def test_scores_know_which_episodes_share_demonstrations() -> None:
    toy = tv.load_model("toy", device="cpu")
    tasks = tv.bitwise_tasks(null=False)
    episodes = tv.sample_episodes(tasks, 24, 2, seed=0, demo_sets=8)
    scores = tv.evaluate(toy, episodes)
    assert scores.demo_sets.tolist() == [episode.demo_set for episode in episodes]
    assert "24 queries per task, 48 demonstration sets" in repr(scores)
    own = scores.of("XOR")
    assert own.demo_sets.tolist() == [e.demo_set for e in episodes if e.task == "XOR"]
    assert own.to_frame().demo_set.tolist() == own.demo_sets.tolist()
    shared, alone = own.interval(), replace(own, demo_sets=None).interval()
    assert 0 <= shared[0] < alone[0] <= own.accuracy <= alone[1] <= shared[1] <= 1
    bare = tv.evaluate(toy, tv.zero_shot(episodes))
    assert bare.demo_sets is None and "demo_set" not in bare.to_frame()
    vectors = tv.task_vectors(tv.collect(toy, tv.sample_episodes(tasks, 12, 4, seed=1)))
    frames = [
        tv.layer_sweep(toy, some, vectors).to_frame()
        for some in (episodes, [replace(episode, demo_set=None) for episode in episodes])
    ]
    assert (frames[0].accuracy == frames[1].accuracy).all()
    assert (frames[0].high - frames[0].low > frames[1].high - frames[1].low).all()
    widths = [
        of.loss_interval[..., 1] - of.loss_interval[..., 0]
        for of in (
            tv.perturbation_matrix(toy, some, vectors, 1)
            for some in (episodes, [replace(episode, demo_set=None) for episode in episodes])
        )
    ]
    assert (widths[0] != widths[1]).all() and widths[0].mean() > widths[1].mean()
