from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.lab.toy import lines as toy_lines
from transformer_lens_taskvec.lab.toy import model as toy
from transformer_lens_taskvec.lab.toy.lines import ARROW, LINE, LINES, TASKS, bitwise_lines
from transformer_lens_taskvec.lab.toy.model import ToyConfig, ToyRun, shipped_toy_run
from transformer_lens_taskvec.lab.training import loop as train_module
from transformer_lens_taskvec.prompts import ARROW as ARROW_TEMPLATE
from transformer_lens_taskvec.prompts import QA

OPERATORS = tv.bitwise_tasks(null=False)
EARLY = 1
"""The layer at whose end the arrow knows the task and nothing of the query: the lower half's."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tv.load_model("toy", device="cpu")


@pytest.fixture(scope="module")
def vectors(model: Any) -> tv.TaskVectors:
    episodes = tv.sample_episodes(tv.bitwise_tasks(), n=60, n_shots=8, seed=1)
    return tv.task_vectors(tv.collect(model, episodes))


def operators(n_shots: int, seed: int, n: int = 20) -> list[tv.Episode]:
    return tv.sample_episodes(OPERATORS, n=n, n_shots=n_shots, seed=seed)


@pytest.mark.model
def test_the_toy_loads_in_under_a_second(model: Any) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        tv.load_model("toy", device="cpu")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


@pytest.mark.model
def test_the_toy_goes_to_the_device_and_dtype_asked_for(model: Any) -> None:
    elsewhere = tv.load_model("toy", device="meta")  # there need be no accelerator for it
    assert {p.device.type for p in elsewhere.original_model.parameters()} == {"meta"}
    assert elsewhere.cfg.device == "meta"
    exact = tv.load_model("toy", device="cpu", dtype=torch.float64)
    assert {p.dtype for p in exact.original_model.parameters()} == {torch.float64}
    assert exact.cfg.dtype == torch.float64 and model.cfg.dtype == torch.float32
    episodes = operators(2, seed=0, n=2)
    one, other = tv.evaluate(model, episodes), tv.evaluate(exact, episodes)
    torch.testing.assert_close(one.loss.double(), other.loss.double(), atol=1e-4, rtol=1e-4)


def test_the_shipped_run_takes_at_most_two_megabytes() -> None:
    files = [path for path in shipped_toy_run().path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 2_000_000


@pytest.mark.model
def test_the_tokenizer_restores_any_ascii_text_and_adds_nothing_unasked(model: Any) -> None:
    tokenizer = model.tokenizer
    characters = "".join(map(chr, range(32, 127))) + "\n"
    texts = [characters, "  two  spaces ", "example:example->->-\n\n"]
    for template in (tv.PromptTemplate("{x} -> {y}"), ARROW_TEMPLATE, QA):
        episode = tv.sample_episodes(OPERATORS, n=1, n_shots=2, seed=0, template=template)[0]
        texts.append(episode.prompt + episode.answer)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
    prompt = operators(2, seed=0, n=1)[0].prompt
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert (tokenizer.decode(ids[0]), tokenizer.decode(ids[-1])) == ("example:", "->")
    assert model.to_tokens(prompt, prepend_bos=False)[0].tolist() == ids
    assert model.to_tokens(prompt)[0].tolist() == [tokenizer.bos_token_id, *ids]


def test_training_sequences_are_the_librarys_prompts_token_for_token() -> None:
    labels = torch.arange(len(TASKS)).repeat_interleave(4)
    tokens = bitwise_lines(labels[:, None].expand(-1, LINES), torch.Generator().manual_seed(0))
    tokenizer = toy.toy_tokenizer()
    compute: dict[str, Callable[[int, int], int]] = {
        "AND": lambda a, b: a & b,
        "NAND": lambda a, b: 31 - (a & b),
        "OR": lambda a, b: a | b,
        "NOR": lambda a, b: 31 - (a | b),
        "XOR": lambda a, b: a ^ b,
        "XNOR": lambda a, b: 31 - (a ^ b),
    }
    for row, label in zip(tokens, labels.tolist(), strict=True):
        text = tokenizer.decode(row[1:])
        pairs = [line.removeprefix("example:").split("->") for line in text.splitlines()]
        examples = [tv.Example(x, y) for x, y in pairs]
        episode = tv.Episode(TASKS[label], tuple(examples[:-1]), examples[-1])
        assert text == episode.prompt + episode.answer + episode.separator
        written = tokenizer(episode.prompt, add_special_tokens=False)["input_ids"]
        assert row[1 : 1 + len(written)].tolist() == written
        assert len({example.x for example in examples}) == LINES
        for example in examples:
            a, b = (int(number, 2) for number in example.x.split(" "))
            if TASKS[label] != "Null":
                assert int(example.y, 2) == compute[TASKS[label]](a, b)
    own = tv.sample_episodes(tv.bitwise_tasks(), n=1, n_shots=8, seed=0)
    lengths = {len(tokenizer(e.prompt, add_special_tokens=False)["input_ids"]) for e in own}
    assert lengths == {8 * LINE + ARROW + 1}


def test_in_training_only_the_arrow_can_carry_the_task() -> None:
    generator = torch.Generator().manual_seed(1)
    kind = torch.arange(3).repeat(4)
    labels = toy_lines.draw_labels(kind == toy_lines.TWO_TASKS, generator)
    assert ((labels != labels[:, :1]).any(1) == (kind == toy_lines.TWO_TASKS)).all()
    view = toy_lines.training_view(kind, labels)
    for row in range(len(kind)):
        for query in range(LINES * LINE):
            line, is_arrow = query // LINE, query % LINE == ARROW
            before = set(range(query + 1))
            own = {key for key in before if key // LINE == line}
            alike = {key for key in before if labels[row, key // LINE] == labels[row, line]}
            lower = upper = before
            if kind[row] == toy_lines.BY_ARROW:
                lower = upper = own
            if kind[row] != toy_lines.PLAIN and is_arrow:
                lower = alike - own | {query}
            for half, expected in enumerate((lower, upper)):
                seen = view[row, half if view.shape[1] == 2 else 0, query]
                assert set(torch.where(seen)[0].tolist()) == expected


SMALL = dataclasses.replace(
    ToyConfig(), steps=8, batch_size=3, n_checkpoints=3, n_eval=3, warmup=2, d_model=16, d_mlp=16
)


class Killed(BaseException):
    pass


def test_a_killed_training_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    global_state = torch.get_rng_state()
    straight = lab.train(SMALL, tmp_path / "a", seed=3, progress=False, device="cpu")
    assert torch.equal(torch.get_rng_state(), global_state)
    take = train_module._take_step

    def kill(config: Any, state: Any, step: int, *rest: Any) -> None:
        if step == 6:
            raise Killed
        take(config, state, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_module, "_take_step", kill)
        lab.train(SMALL, tmp_path / "b", seed=3, progress=False, device="cpu")
    resumed = lab.train(SMALL, tmp_path / "b", seed=3, progress=False, device="cpu")
    assert resumed.finished and resumed.steps == straight.steps == (0, 2, 8)
    for step in resumed.steps:
        name = f"checkpoints/step_{step:06d}.safetensors"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    torch.testing.assert_close(resumed.accuracy, straight.accuracy, rtol=0, atol=0)
    other = lab.train(SMALL, tmp_path / "c", seed=4, progress=False, device="cpu")
    assert not torch.equal(other.nll[0], straight.nll[0])


def test_a_run_reads_back_and_its_checkpoints_are_models(tmp_path: Path) -> None:
    run = lab.train(SMALL, tmp_path / "run", progress=False, device="cpu")
    read = lab.load_run(tmp_path / "run")
    assert type(read) is ToyRun and read.config == SMALL
    untrained = run.model(0, device="cpu")
    assert untrained.cfg.n_layers == 4 and untrained.tokenizer.decode([4]) == "->"
    assert tv.evaluate(untrained, operators(2, seed=0, n=2)).accuracy == 0
    part = run.export(tmp_path / "part", [0, 8])
    assert part.steps == (0, 8) and part.accuracy.shape == (2, 7, LINES)
    with pytest.raises(ValueError, match="no checkpoint at step 5"):
        run.model(5)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        lab.load_run(tmp_path)
    with pytest.raises((ValueError, TypeError), match="ToyRun"):  # or jaxtyping's check
        lab.measure_emergence(run, progress=False)


def test_shares_of_sequences_sum_to_one_or_less() -> None:
    assert ToyConfig(by_arrow=0.9, two_tasks=0.1)
    with pytest.raises(ValueError, match=r"by_arrow=0.9 and two_tasks=0.2 must be shares"):
        ToyConfig(by_arrow=0.9, two_tasks=0.2)


@pytest.mark.model
def test_more_demonstrations_are_more_accuracy(model: Any) -> None:
    accuracy = [tv.evaluate(model, operators(k, seed=2)).accuracy for k in (0, 1, 2, 4, 8)]
    assert accuracy[0] < 0.4
    assert 0.7 < accuracy[1] < 0.95  # one line rarely shows all four pairs of bits
    assert accuracy[2] > 0.9 and min(accuracy[3:]) > 0.97
    null = tv.sample_episodes([tv.bitwise_tasks()["Null"]], n=100, n_shots=8, seed=2)
    assert tv.evaluate(model, null).accuracy < 0.12  # chance is 1/32


@pytest.mark.model
def test_the_task_is_decodable_from_the_second_layer_on(model: Any) -> None:
    episodes = tv.sample_episodes(tv.bitwise_tasks(), n=60, n_shots=4, seed=3)
    td = tv.task_decodability(tv.collect(model, episodes))
    assert td.mean[0] < 0.5
    assert td.at(EARLY).min() > 0.9


@pytest.mark.model
def test_null_is_not_told_from_itself(model: Any) -> None:
    null = tv.bitwise_tasks()["Null"]
    episodes = tv.sample_episodes([null], n=120, n_shots=4, seed=4)
    halves = [
        dataclasses.replace(episode, task=f"Null {number % 2}")
        for number, episode in enumerate(episodes)
    ]
    td = tv.task_decodability(tv.collect(model, halves))
    assert (td.mean - 0.5).abs().max() < 0.15


@pytest.mark.model
def test_vectors_do_the_task_without_demonstrations_up_to_where_the_query_is_read(
    model: Any, vectors: tv.TaskVectors
) -> None:
    sweep = tv.layer_sweep(model, tv.zero_shot(operators(8, seed=5)), vectors)
    by_layer = sweep.accuracy.mean(dim=1)
    assert sweep.best_layer() == EARLY
    assert sweep.baseline_accuracy.mean() < 0.4 and by_layer[0] < 0.4
    assert sweep.at(EARLY).min() > 0.85
    assert by_layer[-1] < 0.5


@pytest.mark.model
def test_the_right_vector_is_harmless_and_a_wrong_one_breaks_the_answer(
    model: Any, vectors: tv.TaskVectors
) -> None:
    matrix = tv.perturbation_matrix(model, operators(4, seed=6), vectors, EARLY)
    own = torch.tensor([[s == t for t in matrix.targets] for s in matrix.sources])
    assert matrix.delta_accuracy[own].min() > -0.06
    assert matrix.delta_accuracy[~own].mean() < -0.8 and matrix.delta_accuracy[~own].max() < -0.3
    assert matrix.conditional_decoding > 4


@pytest.mark.model
def test_vectors_repair_one_shot_prompts_and_nulls_breaks_four_shot_ones(
    model: Any, vectors: tv.TaskVectors
) -> None:
    one = tv.steering_effect(model, operators(1, seed=7), vectors, EARLY)
    assert one.unperturbed.accuracy < 0.95
    assert one.positive.accuracy > one.unperturbed.accuracy + 0.05
    assert one.positive.accuracy > 0.97
    four = tv.steering_effect(model, operators(4, seed=7), vectors, EARLY)
    assert four.unperturbed.accuracy > 0.97
    assert four.negative.accuracy < 0.25


@pytest.mark.model
def test_three_heads_carry_the_task_and_make_a_function_vector(model: Any) -> None:
    episodes = operators(8, seed=8, n=40)
    effects = tv.head_effects(model, episodes)
    heads = effects.top(3)
    assert {layer for layer, _ in heads} == {EARLY}
    ranked = effects.probability.flatten().sort(descending=True).values
    assert ranked[0] > 0.05 and ranked[2] > 3 * ranked[3]
    vectors = tv.function_vectors(model, episodes, n_heads=3, effects=effects)
    queries = tv.zero_shot(operators(8, seed=9))
    before, after = [], []
    for task in OPERATORS:
        own = [episode for episode in queries if episode.task == task]
        added = vectors.inject(task, EARLY - 1)
        before.append(tv.evaluate(model, own).accuracy)
        after.append(tv.evaluate(model, own, added).accuracy)
    assert sum(before) / len(before) < 0.4 < 0.6 < sum(after) / len(after)
    assert all(b > a for a, b in zip(before, after, strict=True))


@pytest.mark.model
def test_an_answer_needs_two_heads_that_gather_the_task_and_few_others(model: Any) -> None:
    effects = tv.head_effects(model, operators(4, seed=8), ablation="mean").probability
    assert (effects[EARLY] < -0.15).sum() >= 2
    assert effects[EARLY].min() < -0.5
    assert (effects < -0.1).sum() <= 6


@pytest.mark.model
def test_td_and_accuracy_rise_together_over_the_checkpoints() -> None:
    run = shipped_toy_run()
    episodes = tv.sample_episodes(OPERATORS, n=20, n_shots=4, seed=9)
    td, accuracy = [], []
    for step in run.steps:
        model = run.model(step, device="cpu")
        td.append(float(tv.task_decodability(tv.collect(model, episodes)).mean.max()))
        accuracy.append(tv.evaluate(model, episodes).accuracy)
    assert len(run.steps) >= 4
    assert accuracy[0] < 0.25 < 0.95 < accuracy[-1] and td[0] < 0.5 < 0.95 < td[-1]
    for rising in (accuracy, td):
        assert max(a - b for a, b in pairwise(rising)) < 0.05


@pytest.mark.skipif(zoo.HookedTransformer is None, reason="TransformerLens 4 has no such class")
@pytest.mark.model
def test_both_classes_give_the_same_answers(model: Any, vectors: tv.TaskVectors) -> None:
    hooked = zoo.hooked_transformer(model.original_model, model.tokenizer, model.cfg.model_name)
    episodes = tv.zero_shot(operators(8, seed=5, n=5))
    one = tv.layer_sweep(model, episodes, vectors)
    with pytest.warns(UserWarning, match="takes no 4-D attention mask"):
        other = tv.layer_sweep(hooked, episodes, vectors)
    torch.testing.assert_close(one.loss, other.loss, atol=1e-3, rtol=1e-3)
    assert torch.equal(one.correct, other.correct)
