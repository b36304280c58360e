"""LEGO: chains against a plain interpreter, oracles by enumeration, planted values, a tiny run."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor, nn

import transformer_lens_taskvec as tv
from transformer_lens_taskvec import lab
from transformer_lens_taskvec.lab.problems.lego.chains import (
    FIRST_LETTER,
    clause_ceiling,
    even_chance,
    query_places,
    read_chains,
)
from transformer_lens_taskvec.lab.problems.lego.finding import chain_accuracy
from transformer_lens_taskvec.lab.problems.lego.problem import Lego
from transformer_lens_taskvec.lab.problems.lego.values import plot_values, value_decodability
from transformer_lens_taskvec.lab.training.on_problem import Run

pytestmark = pytest.mark.usefixtures("one_thread")

PROBLEM = Lego(n_vars=5, n_supervised=3, n_letters=9)


def draw(problem: Lego, n: int, seed: int = 0, labels: Tensor | None = None) -> lab.Batch:
    return problem.sample(n, torch.Generator().manual_seed(seed), labels=labels)


def interpreted(text: str) -> dict[str, int]:
    """The values of all variables, found by running the clauses until nothing changes."""
    clauses = [clause.split() for clause in text.split(";")[0].split(", ")]
    known = {"0": 0, "1": 1}
    while len(known) < 2 + len(clauses):
        for source, operation, target in clauses:
            if source in known:
                known[target] = known[source] ^ (operation == "not")
    return known


def depth(text: str) -> list[str]:
    """The variables in the order in which the clauses define them."""
    follows = {
        source: target for source, _, target in map(str.split, text.split(";")[0].split(", "))
    }
    chain = [follows.get("0") or follows["1"]]
    while chain[-1] in follows:
        chain.append(follows[chain[-1]])
    return chain


def test_values_are_those_of_an_interpreter_in_the_order_of_the_chain() -> None:
    batch = draw(PROBLEM, 200)
    chains = read_chains(batch.xs, PROBLEM.n_vars)
    for row, tokens in enumerate(batch.xs):
        text = PROBLEM.spell(tokens)
        order, known = depth(text), interpreted(text)
        assert len(order) == 5 == len(set(order))
        assert batch.ys[row].tolist() == [known[letter] for letter in order]
        assert chains.values[row].tolist() == batch.ys[row].tolist()
        assert tokens[chains.clause_at[row]].tolist() == chains.letters[row].tolist()
        words = text.replace(",", "").replace(";", "").split()
        places = query_places(batch.xs, 5)[row].tolist()
        assert [words[place].rstrip("?") for place in places] == order


def test_after_the_clauses_there_are_letters_only_in_random_order() -> None:
    batch = draw(PROBLEM, 4000)
    assert (batch.xs[:, 15:] >= FIRST_LETTER).all()
    slots = query_places(batch.xs, 5) - 15
    share = torch.stack([(slots == slot).float().mean(0) for slot in range(5)])
    torch.testing.assert_close(share, torch.full((5, 5), 0.2), atol=0.03, rtol=0)
    clauses = (read_chains(batch.xs, 5).clause_at - 2) // 3
    share = torch.stack([(clauses == slot).float().mean(0) for slot in range(5)])
    torch.testing.assert_close(share, torch.full((5, 5), 0.2), atol=0.03, rtol=0)


def test_bits_are_uniform_and_the_label_is_the_last_supervised_value() -> None:
    labels = lab.balanced_labels(2, 2000)
    for batch in (draw(PROBLEM, 4000), draw(PROBLEM, 4000, labels=labels)):
        assert (batch.ys[:, 2] == batch.labels).all()
        torch.testing.assert_close(
            batch.ys.float().mean(0), torch.full((5,), 0.5), atol=0.03, rtol=0
        )
        negated = read_chains(batch.xs, 5).negated.float().mean(0)
        expected = torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5])
        torch.testing.assert_close(negated, expected, atol=0.03, rtol=0)
    assert batch.labels.equal(labels)
    few = draw(Lego(n_vars=5, n_supervised=3, negation=0.1), 4000)
    rare = read_chains(few.xs, 5).negated[:, 1:].float().mean()
    assert rare == pytest.approx(0.1, abs=0.02) and few.ys.float().mean() == pytest.approx(
        0.5, abs=0.03
    )
    assert batch.weights is not None and (batch.weights == torch.tensor([1.0, 1, 1, 0, 0])).all()
    assert draw(PROBLEM, 9).xs.equal(draw(PROBLEM, 9).xs)


def test_counting_knows_what_an_enumeration_of_all_chains_gives() -> None:
    table = even_chance(3)
    for position, count in itertools.product(range(4), range(4)):
        steps = [s for s in itertools.product((0, 1), repeat=3) if sum(s) == count]
        even = [sum(s[:position]) % 2 == 0 for s in steps]
        assert table[position, count] == pytest.approx(sum(even) / len(even))
    problem = Lego(n_vars=4, n_supervised=4)
    batch = draw(problem, 300)
    chance = problem.oracles(batch)["counts"].softmax(-1)[..., 1]
    chains = read_chains(batch.xs, 4)
    for row in range(300):
        count, first = int(chains.negated[row].sum()), int(chains.values[row, 0])
        expected = [table[at, count] if first else 1 - table[at, count] for at in range(4)]
        torch.testing.assert_close(chance[row], torch.stack(expected))


def test_the_oracles_know_what_they_say() -> None:
    errors = lab.oracle_errors(Lego(n_vars=5, n_supervised=5), n_sequences=4000)
    assert errors.best in ("chain", "supervised steps") and not errors.told
    assert errors["chain"].tolist() == [0.0] * 5
    assert errors["chance"].tolist() == pytest.approx([math.log(2)] * 5)
    counts = errors["counts"]
    assert counts[0] == counts[-1] == 0 and (counts[1:4] > 0.4).all()
    batch = draw(PROBLEM, 50)
    oracles = PROBLEM.oracles(batch)
    losses = PROBLEM.losses(oracles["supervised steps"], batch.ys, batch.labels[:, None])
    torch.testing.assert_close(
        losses, torch.tensor([0, 0, 0, math.log(2), math.log(2)]).expand(50, 5)
    )
    assert PROBLEM.posterior(batch)[:, 0].argmax(-1).equal(batch.labels)
    assert PROBLEM.distance(
        oracles["chance"], oracles["chain"]
    ).flatten().tolist() == pytest.approx([math.log(2)] * 250)
    several = lab.oracle_errors(PROBLEM, n_sequences=50)
    assert several["chain"][3:].isnan().all() and several.late("chance") == pytest.approx(
        math.log(2)
    )


def test_the_ceiling_at_a_clause_is_that_of_all_orders() -> None:
    orders = list(itertools.permutations(range(4)))
    for position, ceiling in enumerate(clause_ceiling(4).tolist()):
        known = [all(o[p] < o[position] for p in range(position)) for o in orders]
        assert ceiling == pytest.approx((1 + sum(known) / len(known)) / 2)


def test_an_episode_is_the_clauses_and_the_query_of_the_last_supervised_variable() -> None:
    episodes = lab.problem_episodes(PROBLEM, 10, seed=3)
    assert {episode.n_shots for episode in episodes} == {2}
    for episode in episodes:
        assert episode.prompt.shape == (16,)
        text = PROBLEM.spell(episode.prompt)
        asked = text.split("; ")[1].rstrip("?")
        assert asked == depth(text)[2]
        assert int(episode.answer) == interpreted(text)[asked] == int(episode.task)
    first, *_ = lab.problem_episodes(PROBLEM, 1, n_shots=0, seed=3)
    text = PROBLEM.spell(first.prompt)
    assert text.split("; ")[1] == f"{depth(text)[0]}?"


def test_predictions_are_put_in_the_order_of_the_chain() -> None:
    batch = draw(PROBLEM, 40)

    def solved(tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, PROBLEM.d_vocab)
        for row, place in itertools.product(range(len(tokens)), range(15, 20)):
            text = PROBLEM.spell(tokens[row])
            letter = text.split("; ")[1].split()[place - 15].rstrip("?")
            logits[row, place, interpreted(text)[letter]] = 9.0
        return logits

    assert PROBLEM.right(PROBLEM.predict(solved, batch), batch.ys, batch.labels[:, None]).all()


class Planted(nn.Module):
    """Its residual stream holds noise, and a variable's value where ``holds`` says so."""

    def __init__(self, problem: Lego, n_layers: int, holds: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.problem, self.holds = problem, holds
        self.cfg = SimpleNamespace(n_layers=n_layers)
        self.unused = nn.Parameter(torch.zeros(1))

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: list[Any]) -> None:
        values = read_chains(tokens, self.problem.n_vars).values
        places = query_places(tokens, self.problem.n_vars)
        generator = torch.Generator().manual_seed(0)
        for layer, (_, hook) in enumerate(fwd_hooks):
            residual = torch.randn(*tokens.shape, 8, generator=generator)
            for position in range(self.problem.n_vars):
                if self.holds(layer, position):
                    rows = torch.arange(len(tokens))
                    residual[rows, places[:, position], 3] = 6.0 * values[:, position]
            hook(residual, None)


def test_planted_values_are_found_where_they_are() -> None:
    problem = Lego(n_vars=4, n_supervised=3)
    diagonal = value_decodability(Planted(problem, 4, lambda layer, i: layer > i), problem, n=200)
    assert diagonal.readable_from().tolist()[:3] == [1, 2, 3]
    assert diagonal.readable_from()[3].isnan()
    assert diagonal.layers_per_position() == pytest.approx(1)
    assert diagonal.rank_correlation() == pytest.approx(1)
    held = torch.tensor([[layer > i for i in range(4)] for layer in range(4)])
    assert diagonal.scores[0][held].min() > 0.95 and diagonal.scores[0][~held].max() < 0.67
    assert diagonal.scores[1].max() < 0.67 and diagonal.shuffled.max() < 0.67
    assert diagonal.readable_from("clause").isnan().all()
    assert math.isnan(diagonal.layers_per_position("clause"))
    column = value_decodability(
        Planted(problem, 3, lambda layer, i: layer > 1), problem, n=200, method="knn"
    )
    assert column.readable_from().tolist() == [2, 2, 2, 2]
    assert column.layers_per_position() == 0 == column.rank_correlation()
    with pytest.raises(ValueError, match=r"place is 'answer'; values are read at one of"):
        column.readable_from("answer")
    with pytest.raises(ValueError, match="n is 5; a probe needs 20 sequences or more"):
        value_decodability(Planted(problem, 1, lambda *_: True), problem, n=5)
    plt.close(plot_values(column))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    problem = Lego(n_vars=3, n_supervised=2, n_letters=3)
    sizes = {"n_layers": 2, "d_model": 32, "batch_size": 64, "n_checkpoints": 3, "n_eval": 50}
    settings: dict[str, Any] = {**problem.defaults, **sizes, "steps": 160, "warmup": 20}
    config = lab.TrainConfig(problem=problem, **settings)
    folder = tmp_path_factory.mktemp("lego")
    trained: Run = lab.train(config, folder, progress=False, device="cpu")
    return trained


def test_a_run_learns_the_first_variable_and_is_read_back(run: Run) -> None:
    assert lab.load_run(run.path).config == run.config
    assert run.accuracy[-1, :, 0].mean() > 0.9
    assert run.accuracy[-1, :, 2].isnan().all() and run.late_loss.isfinite().all()
    accuracy = chain_accuracy(run, run.config.problem, n=1000)
    assert accuracy[0] > 0.9 and accuracy[:2].sub(run.accuracy[-1].mean(0)[:2]).abs().max() < 0.15
    assert 0.3 < accuracy[2] < 0.7


def test_its_episodes_are_answered_as_its_sequences_are(run: Run) -> None:
    problem = run.config.problem
    episodes = lab.problem_episodes(problem, 20, n_shots=1)
    scores = tv.evaluate(run.model(), episodes)
    labels = lab.balanced_labels(2, 20)
    batch = draw(problem, 40, labels=labels)
    first = query_places(batch.xs, 3)[:, 1] == problem.query_at(1)
    with torch.no_grad():
        logits = problem.predict(run.model(), batch)[:, 1]
    right = problem.right(logits, batch.ys[:, 1], batch.labels)
    assert first.sum() > 5 and scores.correct[first].tolist() == right[first].tolist()


def test_its_emergence_is_measured_and_drawn(run: Run) -> None:
    found = lab.measure_emergence(run, n=12, n_oracle=50, progress=False)
    assert found.n_shots == 1 and found.td.shape[1:] == (2, 2)
    distance = dict(zip(found.oracles.names, found.oracle_distance[-1].tolist(), strict=True))
    # Of the supervised positions alone the two oracles agree.
    assert distance["chain"] == pytest.approx(distance["supervised steps"])
    for figure in lab.emergence_figures(run, found, n=12).values():
        figure.canvas.draw()
        plt.close(figure)


def test_its_finding_says_where_values_are_readable(run: Run, tmp_path: Path) -> None:
    finding = run.config.problem.finding(run)
    assert finding.numbers["accuracy"][0] > 0.9
    assert finding.numbers["accuracy_of_chain"] == [1.0] * 3
    assert finding.numbers["accuracy_of_supervised steps"] == [1.0, 1.0, 0.5]
    assert finding.numbers["accuracy_of_counts"][2] == 1.0
    assert finding.numbers["accuracy_where_counts_is_wrong"][::2] == [None, None]
    assert finding.numbers["highest_shuffled"] < 0.65
    assert (
        "Beyond these positions" in finding.sentence and "layers per position" in finding.sentence
    )
    finding.save(tmp_path)
    assert json.loads((tmp_path / "finding.json").read_text())["n_supervised"] == 2
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        f"finding_{name}" for name in ("accuracy", "values", "training")
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_vars": 1}, "n_vars must be at least 2, got 1"),
        ({"n_supervised": 7}, "n_supervised must be from 2 to n_vars, 6; got 7"),
        ({"n_letters": 5}, "n_letters is 5; 6 variables need a letter each"),
        ({"negation": 1.5}, "negation is a chance, from 0 to 1; got 1.5"),
        ({"tasks": ("0",)}, "tasks must be two"),
    ],
)
def test_impossible_chains_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lego(**settings)


def test_rows_that_are_no_chains_are_refused() -> None:
    for tokens, message in (
        ([[4, 2, 5]], "must hold one clause with a value"),
        ([[0, 2]], "tokens has 2 a row; 1 clauses take 3"),
    ):
        with pytest.raises(ValueError, match=message):
            read_chains(torch.tensor(tokens), 1)
    with pytest.raises(ValueError, match="a chain that ends after 1 of 2"):
        read_chains(torch.tensor([[0, 2, 5, 7, 2, 6]]), 2)
    with pytest.raises(ValueError, match="must ask for every variable"):
        query_places(torch.tensor([[0, 2, 5, 6]]), 1)
