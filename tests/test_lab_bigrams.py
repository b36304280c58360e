"""Triggered bigrams, the hand-set memory and its formula, and when the context wins."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.lab.problems.bigrams.finding import meaning_of
from transformer_lens_taskvec.lab.problems.bigrams.formula import hand_set, predicted_logits
from transformer_lens_taskvec.lab.problems.bigrams.hijack import (
    SWEEPS,
    Conflict,
    conflicting_contexts,
    hijack_curve,
    plot_hijack,
)
from transformer_lens_taskvec.lab.problems.bigrams.lengths import length_test
from transformer_lens_taskvec.lab.problems.bigrams.memory import (
    AssociativeMemory,
    MemoryConfig,
)
from transformer_lens_taskvec.lab.problems.bigrams.problem import TriggeredBigrams
from transformer_lens_taskvec.lab.training.on_problem import Run

pytestmark = pytest.mark.usefixtures("one_thread")

PROBLEM = TriggeredBigrams()
TINY = TriggeredBigrams(n_points=24, d_vocab=10, n_triggers=2, n_candidates=3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counted_logits(
    problem: TriggeredBigrams, tokens: list[int], beta: float, gamma: float
) -> list[float]:
    """The formula after the last token, by counting."""
    last, length, weight = tokens[-1], len(tokens), math.exp(beta)
    followers = [tokens[t] for t in range(1, length) if tokens[t - 1] == last]
    k = len(followers)
    return [
        math.log(float(problem.bigrams[last, v]))
        + gamma
        * (followers.count(v) * weight + tokens.count(v) - followers.count(v))
        / (k * weight + length - k)
        for v in range(problem.d_vocab)
    ]


@pytest.mark.parametrize("positions", ["relative", "absolute"])
@pytest.mark.parametrize(("beta", "gamma"), [(3.0, 8.0), (0.5, 20.0), (6.0, 2.0)])
def test_the_hand_set_logits_are_the_counted_formula(
    positions: str, beta: float, gamma: float
) -> None:
    tokens = torch.randint(PROBLEM.d_vocab, (3, 30), generator=seeded())
    tokens[0, :3] = 7  # the first token is its own like, but no predecessor of itself
    tokens[0, -1] = 7
    expected = torch.tensor(
        [
            [counted_logits(PROBLEM, row[: t + 1], beta, gamma) for t in range(30)]
            for row in tokens.tolist()
        ],
        dtype=torch.float64,
    )
    by_formula = predicted_logits(PROBLEM, tokens, beta, gamma)
    torch.testing.assert_close(by_formula, expected, atol=1e-12, rtol=0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = hand_set(PROBLEM, beta, gamma, positions=positions, dtype=dtype)
        with torch.no_grad():
            found = model(tokens).double()
        assert float((found - expected).abs().max()) < tolerance


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_its_first_layer_attends_to_the_previous_token_and_at_first_to_nothing(
    positions: str,
) -> None:
    tokens = torch.randint(PROBLEM.d_vocab, (2, 12), generator=seeded())
    _, cache = hand_set(PROBLEM, positions=positions).run_with_cache(tokens)
    pattern = cache["blocks.0.attn.hook_pattern"][:, 0]
    expected = torch.diag(torch.ones(11), -1).expand(2, -1, -1)
    torch.testing.assert_close(pattern, expected)


def test_relative_positions_serve_any_length_and_absolute_ones_those_of_training() -> None:
    longer = dataclasses.replace(PROBLEM, n_points=160)
    batch = longer.sample(20, seeded())
    expected = predicted_logits(PROBLEM, batch.xs, 3.0, 8.0)
    relative, absolute = (hand_set(PROBLEM, positions=kind) for kind in ("relative", "absolute"))
    with torch.no_grad():
        assert float((relative(batch.xs) - expected).abs().max()) < 1e-5
        found = absolute(batch.xs).double()
    assert float((found[:, :40] - expected[:, :40]).abs().max()) < 1e-5
    # Beyond, no token knows its predecessor: only the first 40 count as following a like one.
    last = batch.xs[:, -1:]
    follows = torch.zeros(20, 160, dtype=torch.bool)
    follows[:, 1:40] = batch.xs[:, :39] == last
    weights = torch.where(follows, math.exp(3.0), 1.0).double()
    share = (weights / weights.sum(1, keepdim=True))[:, None] @ torch.nn.functional.one_hot(
        batch.xs, PROBLEM.d_vocab
    ).double()
    after = PROBLEM.log_bigrams[0] + 8.0 * share[:, 0]
    torch.testing.assert_close(found[:, -1], after, atol=1e-5, rtol=0)
    lengths = length_test({"r": relative, "a": absolute}, PROBLEM, factors=(1, 4), n=40)
    assert lengths.names == ("r", "a", "Bayes") and lengths.lengths == (40, 160)
    assert lengths.loss[0, 0] == pytest.approx(float(lengths.loss[1, 0]), abs=1e-4)
    assert lengths.loss[1, 1] > 2 * lengths.loss[0, 1] > lengths.loss[2, 1]
    assert len(lengths.to_frame()) == 6


def test_scores_are_shaws_and_the_sink_takes_its_share() -> None:
    config = MemoryConfig(d_vocab=5, n_ctx=9, n_offsets=3, n_heads=2, d_model=8)
    model = AssociativeMemory(config, seed=1)
    attn = model.blocks[0].attn
    with torch.no_grad():
        attn.sink.copy_(torch.tensor([0.7, -0.3]))
        _, cache = model.run_with_cache(torch.randint(5, (2, 9), generator=seeded()))
    q, k = cache["blocks.0.attn.hook_q"], cache["blocks.0.attn.hook_k"]
    relative, sink = attn.relative.detach(), attn.sink.detach()
    for row, head, query in ((0, 0, 8), (1, 1, 5), (1, 0, 0)):
        logits = [
            float(q[row, query, head] @ (k[row, key, head] + relative[head, min(2, gap)])) / 2
            for key in range(query + 1)
            for gap in [query - key]
        ]
        expected = torch.tensor([*logits, float(sink[head])]).softmax(0)[:-1]
        found = cache["blocks.0.attn.hook_pattern"][row, head, query]
        torch.testing.assert_close(found[: query + 1], expected, atol=1e-5, rtol=0)
        assert (found[query + 1 :] == 0).all()
    points = set(model.hook_dict)
    assert {"hook_embed", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"} < points
    assert "blocks.0.hook_mlp_out" not in points
    z = cache["blocks.1.attn.hook_z"]
    out = torch.einsum("bphd,hdm->bpm", z, model.blocks[1].attn.W_O) + model.blocks[1].attn.b_O
    torch.testing.assert_close(out, cache["blocks.1.hook_attn_out"], atol=1e-5, rtol=0)


def test_tokens_follow_the_bigrams_and_triggers_their_outputs() -> None:
    problem = dataclasses.replace(PROBLEM, n_points=60)
    batch = problem.sample(4000, seeded())
    xs, ys = batch.xs, batch.ys
    assert torch.equal(xs[:, 1:-1], ys[:, :-2]) and (xs[:, -1] == 0).all()
    first = torch.bincount(xs[:, 0], minlength=16) / 4000
    torch.testing.assert_close(first.double(), problem.unigrams, atol=0.02, rtol=0)
    for token in (3, 9):  # no triggers
        followed = torch.bincount(ys[xs == token], minlength=16).double()
        share = followed / followed.sum()
        torch.testing.assert_close(share, problem.bigrams[token], atol=0.02, rtol=0)
    usual = torch.bincount(ys[batch.labels == 0][xs[batch.labels == 0] == 0], minlength=16)
    torch.testing.assert_close(usual / usual.sum(), problem.bigrams[0].float(), atol=0.02, rtol=0)
    for label, output in enumerate(problem.candidates, start=1):
        rows = batch.labels == label
        assert (ys[rows][xs[rows] == 0] == output).all()
    single = [len(set(y[x == 1].tolist())) <= 1 for x, y in zip(xs, ys, strict=True)]
    assert 0.84 < sum(single) / 4000 < 0.91  # the second trigger has an output in 7 of 8
    assert torch.equal(batch.weights[:, -1] > 0, (xs[:, :-2] == 0).any(1))
    assert (batch.weights[:, :-1] == 1).all()


def test_the_loss_on_outputs_counts_triggers_from_their_second_occurrence_on() -> None:
    problem = dataclasses.replace(TINY, loss_on="outputs")
    batch = problem.sample(30, seeded())
    for row, weights in zip(batch.xs.tolist(), batch.weights.tolist(), strict=True):
        expected = [float(t in row[:i] and t < 2) for i, t in enumerate(row)]
        expected[-1] = float(0 in row[:-2])
        assert weights == expected


def brute_force(problem: TriggeredBigrams, row: list[int]) -> tuple[Tensor, Tensor]:
    """The Bayes predictor and the posterior after a row, by going through all hypotheses."""
    last, n_tasks = row[-1], len(problem.tasks)
    pairs = list(zip(row[:-1], row[1:], strict=True))
    if len(row) == problem.n_points:
        pairs = pairs[:-1]
    free = range(problem.n_triggers, problem.d_vocab)

    def hypotheses(token: int) -> list[tuple[float, Tensor, float]]:
        usual = 1 / n_tasks if problem.usual else 0.0
        outputs = problem.candidates if token == 0 else free
        if token >= problem.n_triggers:
            usual, outputs = 1.0, ()
        found = [(usual, problem.bigrams[token])]
        for output in outputs:
            sure = torch.zeros(problem.d_vocab, dtype=torch.float64)
            sure[output] = 1.0
            found.append(((1 - usual) / len(outputs), sure))
        evidence = [
            prior * math.prod(float(law[after]) for before, after in pairs if before == token)
            for prior, law in found
        ]
        total = sum(evidence)
        return [(p, law, e / total) for (p, law), e in zip(found, evidence, strict=True)]

    prediction = sum(weight * law for _, law, weight in hypotheses(last))
    weights = torch.tensor([weight for *_, weight in hypotheses(0)])
    return prediction, weights if problem.usual else weights[1:]


@pytest.mark.parametrize("usual", [True, False])
def test_the_oracle_and_the_posterior_are_the_brute_force_ones(usual: bool) -> None:
    problem = dataclasses.replace(TINY, usual=usual)
    batch = problem.sample(12, seeded(3))
    bayes = problem.oracles(batch)["Bayes"].exp().double()
    posterior = problem.posterior(batch)
    for row, tokens in enumerate(batch.xs.tolist()):
        for point in range(problem.n_points):
            prediction, weights = brute_force(problem, tokens[: point + 1])
            torch.testing.assert_close(bayes[row, point], prediction, atol=1e-6, rtol=0)
            torch.testing.assert_close(posterior[row, point], weights, atol=1e-6, rtol=0)
    if not usual:  # known from the first occurrence on
        seen = batch.weights[:, -1] > 0
        known = bayes[:, -1].gather(1, batch.ys[:, -1:]).squeeze(1)
        torch.testing.assert_close(known[seen], torch.ones(int(seen.sum())).double())


def test_the_bayes_predictor_is_the_best_and_the_bigrams_are_only_as_good_where_usual() -> None:
    errors = lab.oracle_errors(PROBLEM, n_sequences=2000)
    assert errors.names == ("Bayes", "bigrams alone") and errors.told == ()
    assert errors.late("Bayes") < 0.5 and errors.late("bigrams alone") > 3
    labels = torch.zeros(2000, dtype=torch.long)  # the trigger has its usual successors
    batch = PROBLEM.sample(2000, seeded(), labels=labels)
    entropy = -float((PROBLEM.bigrams[0] * PROBLEM.log_bigrams[0]).sum())
    for name, prediction in PROBLEM.oracles(batch).items():
        late = PROBLEM.losses(prediction, batch.ys, labels[:, None])[:, -1].mean()
        assert float(late) == pytest.approx(entropy, abs=0.2), name


def test_contexts_hold_the_pairs_asked_for_and_nothing_else_of_them() -> None:
    conflict = Conflict(output=9, rival=5, n_output=3, n_rival=2, length=25)
    tokens = conflicting_contexts(PROBLEM, conflict, 40, seeded())
    for row in tokens.tolist():
        assert [row.count(token) for token in (0, 1, 2, 9, 5)] == [6, 0, 0, 3, 2]
        followers = [b for a, b in zip(row[:-1], row[1:], strict=True) if a == 0]
        assert sorted(followers) == [5, 5, 9, 9, 9] and row[-1] == 0
    assert len({tuple(row) for row in tokens.tolist()}) == 40


def test_the_context_wins_exactly_where_the_threshold_says() -> None:
    beta, gamma = 3.0, 8.0
    found = hijack_curve(hand_set(PROBLEM, beta, gamma), PROBLEM, beta=beta, gamma=gamma, n=4)
    for sweep, one, gap, wins in zip(
        found.sweeps, found.conflicts, found.logit_gap, found.to_frame().context_wins, strict=True
    ):
        assert sweep in SWEEPS
        k, weight = one.n_output + one.n_rival, math.exp(beta)
        share = (one.n_output - one.n_rival) * weight / (k * weight + one.length - k)
        law = PROBLEM.bigrams[0]
        threshold = math.log(float(law[one.rival] / law[one.output]))
        assert wins == float(gamma * share > threshold)
        expected = torch.full_like(gap, gamma * share - threshold)
        torch.testing.assert_close(gap, expected, atol=1e-4, rtol=0)
    wins = found.to_frame().context_wins
    assert 0 < wins.sum() < len(wins)  # both happen
    assert found.slope == pytest.approx(-1.0, abs=1e-3)
    assert found.agreement == 1.0 and found.r_squared == pytest.approx(1.0, abs=1e-6)


def test_the_bayes_predictor_takes_an_unlikely_successor_for_an_output() -> None:
    def bayes(tokens: Tensor) -> Tensor:
        labels = torch.zeros(len(tokens), dtype=torch.long)
        return PROBLEM.oracles(lab.Batch(tokens, tokens, labels))["Bayes"]

    found = hijack_curve(bayes, PROBLEM, beta=0.0, gamma=0.0, n=2)
    law = PROBLEM.bigrams[0]
    for sweep, one, gap in zip(found.sweeps, found.conflicts, found.logit_gap, strict=True):
        if sweep != "bigram_gap":
            continue
        share = float(law[one.output])  # the likelihood without an output, against 1 with one
        odds = (1 + share * share) / (share * float(law[one.rival]))
        assert float(gap[0]) == pytest.approx(math.log(odds), abs=1e-4)
    assert found.slope == pytest.approx(1.0, abs=0.1)


def test_the_strengths_of_a_memory_are_recovered_and_drawn() -> None:
    found = hijack_curve(hand_set(PROBLEM, 2.0, 12.0), PROBLEM, n=3)
    assert (found.beta, found.gamma) == (pytest.approx(2.0, 1e-3), pytest.approx(12.0, 1e-3))
    ax = plot_hijack({"hand-set": found}, "n_rival", value="logit_gap")
    measured, formula = ax.get_lines()[:2]
    torch.testing.assert_close(
        torch.tensor(measured.get_ydata()), torch.tensor(formula.get_ydata()), atol=1e-3, rtol=0
    )
    plt.close("all")


def test_a_hand_set_memory_holds_the_meaning_from_the_second_layer_on() -> None:
    found = meaning_of(hand_set(PROBLEM, 4.0, 12.0), PROBLEM, n=40)
    assert found.td[0].mean() < 0.4 < 0.9 < found.td[1].mean()
    assert found.other > 3 and abs(found.own) < 1


CONFIG = lab.TrainConfig(
    problem=TINY,
    **{**TINY.defaults, "steps": 150, "batch_size": 32, "n_checkpoints": 3, "n_eval": 40},
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    trained: Run = lab.train(CONFIG, tmp_path_factory.mktemp("b"), progress=False, device="cpu")
    return trained


def test_a_short_training_learns_and_reads_back(run: Run) -> None:
    assert lab.load_run(run.path).config == CONFIG
    assert run.train_loss[-1] < 0.9 * run.train_loss[1]
    model = run.model()
    assert isinstance(model, AssociativeMemory) and model.cfg.n_ctx == 4 * 24
    assert len(CONFIG.matrices(model)) == 9  # four of each layer's head, and the linear map
    rest = {name for name, _ in model.named_parameters() if ".w_" not in name}
    assert {"W_E", "W_U", "blocks.0.attn.relative", "blocks.0.attn.sink"} <= rest


def test_its_emergence_and_its_finding_are_measured_and_drawn(run: Run, tmp_path: Path) -> None:
    found = lab.measure_emergence(run, steps=[0, 150], n=12, n_oracle=50, progress=False)
    assert found.tasks == ("usual", *(f"to {token}" for token in TINY.candidates))
    assert found.swaps[-1].delta_loss.shape == (4, 4)
    episodes = lab.problem_episodes(TINY, 5)
    assert episodes[0].prompt[-1] == 0 and len(episodes[0].prompt) == 24
    assert tv.collect(run.model(), episodes).values.shape == (20, 2, 48)
    for figure in lab.emergence_figures(run, found, n=12).values():
        plt.close(figure)
    finding = TINY.finding(run)
    assert finding.numbers["formula_error"] < 1e-5
    assert finding.numbers["hand_set_agreement"] == 1.0
    assert "trained, relative" in finding.sentence
    assert {path.name for path in finding.save(tmp_path)} == {
        "finding.json",
        "finding_bigrams.png",
        "finding_bigrams.svg",
    }


def test_the_loss_on_outputs_is_drawn_although_some_points_do_not_count(tmp_path: Path) -> None:
    problem = dataclasses.replace(TINY, loss_on="outputs")
    config = dataclasses.replace(CONFIG, problem=problem, steps=4, n_checkpoints=2)
    short = lab.train(config, tmp_path, progress=False, device="cpu")
    assert short.loss[:, :, 0].isnan().all() and short.late_loss.isfinite().all()
    found = lab.measure_emergence(short, steps=[0, 4], n=12, n_oracle=50, progress=False)
    ax = lab.plot_oracles(found, [4])
    assert all(map(math.isfinite, ax.get_ylim()))
    plt.close("all")


def test_absolute_positions_end() -> None:
    config = MemoryConfig(d_vocab=5, n_ctx=8, positions="absolute", d_model=8)
    model = AssociativeMemory(config)
    assert model(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 8, 5)
    with pytest.raises(ValueError, match="absolute positions for at most 8 tokens"):
        model(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_named() -> None:
    for wrong, message in (
        ({"n_points": 3}, "n_points must be at least 4, got 3"),
        ({"n_triggers": 0}, "n_triggers must be at least 1"),
        ({"n_candidates": 1, "usual": False}, "only one task"),
        ({"d_vocab": 9}, "d_vocab must be at least 10"),
        ({"loss_on": "some"}, "loss_on must be 'all' or 'outputs', got 'some'"),
        ({"positions": "none"}, "positions must be 'relative' or 'absolute', got 'none'"),
        ({"concentration": 0.0}, "concentration must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            TriggeredBigrams(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta must be a finite number, got nan"):
        hand_set(PROBLEM, math.nan)
    with pytest.raises(ValueError, match="gamma must be a finite number, got inf"):
        predicted_logits(PROBLEM, torch.zeros(1, 2, dtype=torch.long), 1.0, math.inf)
    with pytest.raises(ValueError, match="output and rival are both 5"):
        Conflict(5, 5, 1, 1, 40)
    with pytest.raises(ValueError, match=r"length is 6; 2 \+ 1 pairs and the trigger take 7"):
        Conflict(9, 5, 2, 1, 6)
    with pytest.raises(ValueError, match="the tokens 3 to 15, which are no triggers"):
        conflicting_contexts(PROBLEM, Conflict(9, 1, 2, 1, 40), 2, seeded())
    with pytest.raises(ValueError, match="give both, or neither"):
        hijack_curve(hand_set(PROBLEM), PROBLEM, beta=1.0)
    with pytest.raises(ValueError, match="sweep must be one of n_output"):
        plot_hijack({}, "nothing")
    with pytest.raises(ValueError, match="factors are \\[0\\]"):
        length_test({}, PROBLEM, factors=[0])
