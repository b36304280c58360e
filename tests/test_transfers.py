"""How often a pass waits for the device: as often whatever the layers and variants."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import zoo
from torch.overrides import TorchFunctionMode

import transformer_lens_taskvec as tv

WAITS = {
    "item",
    "tolist",
    "cpu",
    "nonzero",
    "unique",
    "masked_select",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
}


class Transfers(TorchFunctionMode):
    """Counts the calls that would copy from an accelerator to the host, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        # What follows a tensor to its device names a torch.device.
        to_host = name == "to" and "cpu" in [one for one in args if isinstance(one, str)]
        if name in WAITS or to_host or (name == "where" and len(args) == 1):
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def transfers(run: Any) -> Counter[str]:
    run()  # what is found once per model
    with Transfers() as counted:
        run()
    return counted.seen


@pytest.fixture(params=["llama", "gemma2"])
def models(request: pytest.FixtureRequest, tokenizer: Any) -> list[Any]:
    """The same architecture with few and with many layers."""
    return [zoo.bridge(request.param, tokenizer, num_hidden_layers=n) for n in (2, 6)]


@pytest.fixture
def of_one_length(episodes: list[tv.Episode]) -> list[tv.Episode]:
    return [episode for episode in episodes if episode.task == "upper_case"][:3]


def test_collecting_waits_as_often_with_many_layers(
    models: list[Any], of_one_length: list[tv.Episode]
) -> None:
    few, many = (transfers(lambda m=model: tv.collect(m, of_one_length)) for model in models)
    assert few == many
    assert few.total() <= 8, few


def test_scoring_waits_as_often_with_many_layers_and_variants(
    models: list[Any], of_one_length: list[tv.Episode]
) -> None:
    counts = []
    for model in models:
        vector = torch.ones(int(model.cfg.d_model))
        for n in (2, 12):
            variants = [[], *([tv.inject(vector, 1, scale=float(i))] for i in range(n))]
            counts.append(
                transfers(lambda m=model, v=variants: tv.evaluate_many(m, of_one_length, v))
            )
    assert all(count == counts[0] for count in counts), counts
    assert counts[0].total() <= 16, counts[0]


def test_a_new_token_waits_once(models: list[Any]) -> None:
    short, long = (
        transfers(lambda n=n: tv.generate(models[0], ["one two"], max_new_tokens=n, temperature=1))
        for n in (3, 8)
    )
    assert long.total() - short.total() == 5, (short, long)
