"""Bitwise tasks, checked against Python's integer operators on the parsed digits."""

from __future__ import annotations

import random
import re

import pytest

from transformer_lens_taskvec.tasks.base import Task
from transformer_lens_taskvec.tasks.bitwise import BitwiseTask, bitwise_tasks

NAMES = ["AND", "NAND", "OR", "NOR", "XOR", "XNOR"]


def expected(name: str, a: int, b: int, n_bits: int) -> int:
    """The result by Python's own operators; ``~`` gives a negative number, hence the modulus."""
    value: int = {
        "AND": a & b,
        "NAND": ~(a & b),
        "OR": a | b,
        "NOR": ~(a | b),
        "XOR": a ^ b,
        "XNOR": ~(a ^ b),
    }[name]
    return value % (1 << n_bits)


@pytest.mark.parametrize("n_bits", [1, 2, 5, 8])
@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_the_operation_on_the_two_numbers(name: str, n_bits: int) -> None:
    task = bitwise_tasks(n_bits)[name]
    for example in task.sample(min(4**n_bits, 300), random.Random(0)):
        a, b = example.x.split(" ")
        assert len(a) == len(b) == len(example.y) == n_bits
        assert int(example.y, 2) == expected(name, int(a, 2), int(b, 2), n_bits)


def test_a_worked_example_with_five_digits() -> None:
    pairs = {e.x: e.y for e in bitwise_tasks()["NOR"].sample(1024, random.Random(0))}
    assert pairs["01101 10010"] == "00000"
    assert pairs["00101 00011"] == "11000"


def test_sampling_everything_gives_every_pair_once() -> None:
    inputs = [example.x for example in bitwise_tasks(3)["AND"].sample(64, random.Random(0))]
    assert sorted(inputs) == [f"{a:03b} {b:03b}" for a in range(8) for b in range(8)]


def test_null_comes_last_and_can_be_left_out() -> None:
    assert list(bitwise_tasks()) == [*NAMES, "Null"]
    assert list(bitwise_tasks(null=False)) == NAMES


def test_null_answers_are_random_digits_that_do_not_depend_on_the_input() -> None:
    null = bitwise_tasks()["Null"]
    examples = null.sample(1024, random.Random(0))
    assert all(re.fullmatch("[01]{5}", example.y) for example in examples)
    ones = sum(example.y.count("1") for example in examples) / (5 * 1024)
    assert ones == pytest.approx(0.5, abs=0.04)
    for name in NAMES:
        agreement = sum(
            int(e.y, 2) == expected(name, int(e.x[:5], 2), int(e.x[6:], 2), 5) for e in examples
        )
        assert agreement / 1024 == pytest.approx(1 / 32, abs=0.03)


@pytest.mark.parametrize("name", ["XOR", "Null"])
@pytest.mark.usefixtures("unchecked")  # beartype draws at random what it looks at
def test_equal_seeds_give_equal_samples_without_the_global_random_state(name: str) -> None:
    task = bitwise_tasks()[name]
    state = random.getstate()
    first = task.sample(50, random.Random(7))
    assert random.getstate() == state
    assert first == task.sample(50, random.Random(7))
    assert first != task.sample(50, random.Random(8))


def test_sixteen_bits_are_sampled_without_listing_the_pairs() -> None:
    task = bitwise_tasks(16)["XNOR"]
    assert isinstance(task, BitwiseTask)
    assert len(task) == 4**16
    examples = task.sample(1000, random.Random(0))
    assert len({example.x for example in examples}) == 1000
    assert all(len(example.y) == 16 for example in examples)


def test_tasks_satisfy_the_protocol_and_know_their_size() -> None:
    task = bitwise_tasks(2)["OR"]
    assert isinstance(task, Task)
    assert task == BitwiseTask("OR", 2)
    assert len(BitwiseTask("OR", 2)) == 16


@pytest.mark.parametrize("n_bits", [0, -1, 17])
def test_a_number_of_bits_out_of_range_is_named(n_bits: int) -> None:
    with pytest.raises(ValueError, match=rf"n_bits={n_bits} is out of range; use 1 to 16"):
        bitwise_tasks(n_bits)


def test_an_unknown_operation_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown bitwise operation 'IMPLIES'.*AND, NAND"):
        BitwiseTask("IMPLIES")


@pytest.mark.parametrize(("n", "message"), [(17, "asked for 17 .* has 16"), (-1, "0 or more")])
def test_an_impossible_sample_size_is_named(n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bitwise_tasks(2)["AND"].sample(n, random.Random(0))
