"""Dictionaries whose features are known, and dictionaries trained here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import planted
import pytest
import torch

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.activations import Activations, Source
from transformer_lens_taskvec.models.protocol import fingerprint
from transformer_lens_taskvec.vectors import dictionary as trained_here
from transformer_lens_taskvec.vectors.all_tokens import Origin, residuals
from transformer_lens_taskvec.vectors.cleaning import clean_vectors
from transformer_lens_taskvec.vectors.dictionary import TopKDictionary, train_dictionary
from transformer_lens_taskvec.vectors.encoding import Dictionary, directions
from transformer_lens_taskvec.vectors.feature_accuracy import accuracy_by_features
from transformer_lens_taskvec.vectors.sparse import decompose

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore:.*distinct inputs")]

SOURCE = Source("none", "resid_post", -1, "{x} > {y}", False)
NAMES = [(name, index) for name, size in planted._SIZES.items() for index in range(size)]
TASKS = planted.tasks()


class Bare:
    """Orthonormal features, with nothing but ``encode`` and ``decode``."""

    def __init__(self, rows: torch.Tensor, least: float = 0.0) -> None:
        self.rows, self.least = rows, least

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        found = (x @ self.rows.T).relu()
        return found * (found > self.least)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.rows


def orthonormal(d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows: torch.Tensor = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    return rows


def vectors_of(values: torch.Tensor, layer: int = 3) -> tv.TaskVectors:
    return tv.TaskVectors(values[:, None], tuple("abc"[: len(values)]), (layer,), SOURCE)


def number(name: str, index: int = 0) -> int:
    return NAMES.index((name, index))


CODE = torch.zeros(3, 12)
CODE[0, [1, 4, 7]] = torch.tensor([2.0, 0.5, 1.0])
CODE[1, [4, 8]] = torch.tensor([0.5, 3.0])
CODE[2, [1, 4]] = torch.tensor([2.0, 0.5])


def test_decomposing_finds_the_planted_code() -> None:
    rows = orthonormal(12)
    found = decompose(vectors_of(CODE @ rows), Bare(rows, 1e-4), 3)
    torch.testing.assert_close(found.features, CODE, atol=1e-5, rtol=0)
    own, random = found.reconstructions["vector"], found.reconstructions["random"]
    assert own.error.max() < 1e-5 and own.cosine.min() > 0.99999
    assert own.l0.tolist() == [3, 2, 2]
    # Half of a random vector's numbers are negative, and no feature stands for those.
    assert ((random.error - 0.5**0.5).abs() < 0.15).all() and ((random.l0 - 6).abs() < 1.5).all()
    # Activation minus the others' mean: a has 2 - 1, 0.5 - 0.5 and 1 - 0.
    assert found.top("a")[2] == 4 and set(found.top("a")) == {1, 4, 7}
    assert found.top("b") == (8, 4) and found.top("c", 1) == (1,)
    frame = found.top_frame().set_index(["task", "feature"])
    assert frame.loc[("a", 7), "excess"] == pytest.approx(1.0, abs=1e-5)
    assert frame.loc[("c", 1), "excess"] == pytest.approx(2 - (2 + 0) / 2, abs=1e-5)
    assert len(found.to_frame()) == 3 * 2 and "error 0.00, L0 2.3" in repr(found)


def test_the_numbers_of_a_reconstruction_by_hand() -> None:
    rows = orthonormal(12)
    values = torch.stack([3 * rows[0] + 4 * rows[1], -rows[0] + 2 * rows[1]])
    activations = Activations(
        torch.stack([values[0] + rows[0], values[0] - rows[0], values[1]])[:, None],
        torch.tensor([1, 1, 0]),
        ("b", "a"),  # not the vectors' order
        (3,),
        SOURCE,
    )
    found = decompose(vectors_of(values), Bare(rows[:1]), 3, activations=activations)
    own = found.reconstructions["vector"]
    torch.testing.assert_close(own.error, torch.tensor([4 / 5, 1.0]))
    torch.testing.assert_close(own.cosine, torch.tensor([3 / 5, 0.0]), atol=1e-6, rtol=1e-6)
    assert own.l0.tolist() == [1, 0]
    # a's prompts have 4 and 2 of the feature: lengths 32 ** .5 and 20 ** .5, and 4 is missing.
    alone, mean = found.reconstructions["prompts"], found.reconstructions["mean of encodings"]
    assert float(alone.error[0]) == pytest.approx((4 / 32**0.5 + 4 / 20**0.5) / 2, abs=1e-6)
    assert float(alone.cosine[0]) == pytest.approx((4 / 32**0.5 + 2 / 20**0.5) / 2, abs=1e-6)
    assert float(mean.error[0]) == pytest.approx(4 / 5, abs=1e-6) and mean.l0.tolist() == [1, 0]
    assert found.mean_features is not None
    torch.testing.assert_close(found.mean_features, torch.tensor([[3.0], [0.0]]))


def test_keeping_and_dropping_features_by_hand() -> None:
    rows = orthonormal(12)
    found = decompose(vectors_of(CODE @ rows), Bare(rows, 1e-4), 3)
    torch.testing.assert_close(found.keep(1)["b", 3], 3 * rows[8])
    torch.testing.assert_close(found.drop(1)["b", 3], 0.5 * rows[4])
    torch.testing.assert_close(found.keep(2)["a", 3], 2 * rows[1] + rows[7])
    torch.testing.assert_close(found.drop(2)["a", 3], 0.5 * rows[4], atol=1e-6, rtol=1e-5)
    assert found.keep(0).values.abs().max() == 0
    for whole in (found.keep(3), found.keep(99), found.drop(0)):
        torch.testing.assert_close(whole.at(3), CODE @ rows)
    assert isinstance(found.keep(1), tv.Injectable) and found.keep(1).layers == (3,)
    with pytest.raises(ValueError, match="k is -1"):
        found.keep(-1)
    with pytest.raises(ValueError, match="which needs decompose"):
        found.keep(1, of="mean of encodings")


def test_directions_are_the_decoders_rows_or_what_a_unit_adds() -> None:
    rows, shift = orthonormal(12)[:5], torch.arange(12.0)

    class Shifted(Bare):
        def decode(self, features: torch.Tensor) -> torch.Tensor:
            return super().decode(features) + shift

    assert isinstance(Shifted(rows), Dictionary)
    torch.testing.assert_close(directions(Shifted(rows), 12), rows, atol=1e-5, rtol=0)
    own = TopKDictionary(rows.T.contiguous(), torch.zeros(5), rows, shift, k=2)
    assert directions(own, 12) is not own.b_dec and directions(own, 12).equal(rows)


def with_settings(**settings: Any) -> Bare:
    found = Bare(orthonormal(12))
    found.cfg = SimpleNamespace(**settings)  # type: ignore[attr-defined]
    return found


def test_dictionaries_that_keep_state_or_belong_elsewhere_are_refused() -> None:
    vectors = vectors_of(CODE @ orthonormal(12))
    for settings, told in (
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"normalize_activations": "constant_norm_rescale"}, "constant_norm_rescale"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
        ({"hook_name": "blocks.2.hook_resid_post"}, "belongs to blocks.2.hook_resid_post"),
        ({"metadata": SimpleNamespace(hook_name="blocks.3.hook_resid_pre")}, "belongs to blocks.3"),
    ):
        with pytest.raises(ValueError, match=told):
            decompose(vectors, with_settings(**settings), 3)
    for settings in (
        {"normalize_activations": "none", "hook_name": "blocks.3.hook_resid_post"},
        {"metadata": SimpleNamespace(hook_name="blocks.4.hook_resid_pre")},  # the same place
        {"metadata": SimpleNamespace(hook_name=None), "hook_name": "blocks.3.hook_out"},
    ):
        assert decompose(vectors, with_settings(**settings), 3).top("b", 1) == (8,)
    with pytest.raises(ValueError, match="of type int; give an object with encode and decode"):
        decompose(vectors, 3, 3)
    with pytest.raises(ValueError, match="layer 5 is not among"):
        decompose(vectors, Bare(orthonormal(12)), 5)
    heads = replace(vectors, values=torch.zeros(3, 1, 2, 12))
    with pytest.raises(ValueError, match="axis of heads"):
        decompose(heads, Bare(orthonormal(12)), 3)
    eye = torch.eye(4)
    narrow = TopKDictionary(eye, torch.zeros(4), eye, torch.zeros(4), k=1)
    with pytest.raises(ValueError, match="width 4, the vectors 12"):
        decompose(vectors, narrow, 3)
    with pytest.raises(ValueError, match="belongs to 'other', not to 'none'"):
        decompose(vectors, replace(narrow, origin=Origin("other")), 3)
    with pytest.raises(ValueError, match=r"lack b, c"):
        some = Activations(torch.zeros(1, 1, 12), torch.tensor([0]), ("a",), (3,), SOURCE)
        decompose(vectors, Bare(orthonormal(12)), 3, activations=some)


@pytest.mark.usefixtures("unchecked")
def test_weights_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[\(3, 4\), \(4,\), \(4, 2\), \(2,\)\]; they must be"):
        TopKDictionary(torch.ones(3, 4), torch.ones(4), torch.ones(4, 2), torch.ones(2), k=1)


def codes(n: int, n_features: int, active: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(n, n_features, generator=generator).argsort(dim=1)[:, :active]
    strengths = 1 + torch.rand(n, active, generator=generator)
    return torch.zeros(n, n_features).scatter(1, places, strengths)


def test_top_k_training_recovers_a_planted_dictionary() -> None:
    rows, shift = orthonormal(32), 5 * torch.randn(32, generator=torch.Generator().manual_seed(5))
    made = 20 * (codes(6000, 32, 3, seed=1) @ rows) + shift
    losses: list[float] = []
    options: dict[str, Any] = {"n_features": 40, "k": 3, "batch_size": 256, "rate": 5e-3}
    found = train_dictionary(
        made, **options, steps=500, report=lambda step, loss: losses.append(loss)
    )
    best = (rows @ found.W_dec.T).max(dim=1).values
    assert float((best > 0.95).float().mean()) >= 0.9
    start = train_dictionary(made, **options, steps=1)
    assert float(((rows @ start.W_dec.T).max(dim=1).values > 0.95).float().mean()) == 0
    torch.testing.assert_close(found.W_dec.norm(dim=1), torch.ones(40))
    # On new activations, in their own units.
    new = 20 * (codes(500, 32, 3, seed=2) @ rows) + shift
    features = found.encode(new)
    missing = (found.decode(features) - new).square().sum() / (new - new.mean(dim=0)).square().sum()
    assert float(missing) < 0.1 and losses[-1] < 0.1 < 0.5 < losses[0]
    assert int((features > 0).sum(dim=1).max()) <= 3 and features.min() >= 0
    again = train_dictionary(made, **options, steps=20, seed=4)
    assert again.W_enc.equal(train_dictionary(made, **options, steps=20, seed=4).W_enc)
    assert not again.W_enc.equal(train_dictionary(made, **options, steps=20, seed=5).W_enc)


def test_dead_features_are_revived(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.nn.functional.normalize(torch.randn(128, 32, generator=generator), dim=1)
    # What all activations share is so large that it decides which features live.
    shared = (
        10 * torch.randn(4000, 1, generator=generator) * torch.randn(1, 32, generator=generator)
    )
    made = codes(4000, 128, 3, seed=1) @ rows + shared

    def alive() -> int:
        options: dict[str, Any] = {"n_features": 256, "k": 4, "batch_size": 256, "rate": 0.01}
        found = train_dictionary(made, steps=300, **options)
        return int((found.encode(made) > 0).any(dim=0).sum())

    revived = alive()
    monkeypatch.setattr(trained_here, "_revive", lambda *arguments: None)
    assert revived > 1.5 * alive()


def test_an_outlier_changes_nothing_and_bad_activations_are_refused() -> None:
    made = codes(300, 8, 2, seed=1) @ orthonormal(8)
    options: dict[str, Any] = {"n_features": 8, "k": 2, "steps": 5, "batch_size": 64}
    plain = train_dictionary(made, **options)
    more = torch.cat([made, 1e4 * made[:1]])
    assert train_dictionary(more, **options).W_enc.equal(plain.W_enc)
    assert not train_dictionary(more, **options, outliers=float("inf")).W_enc.equal(plain.W_enc)
    for bad, told in (
        (torch.ones(4, 3), "the standard deviation of the activations is 0.0"),
        (torch.full((4, 3), torch.nan), "nothing to reconstruct"),
    ):
        with pytest.raises(ValueError, match=told):
            train_dictionary(bad, n_features=3, k=1)
    with pytest.raises(ValueError, match="k 9"):
        train_dictionary(made, n_features=8, k=9)
    several = Activations(
        torch.zeros(4, 2, 3), torch.zeros(4, dtype=torch.long), ("a",), (0, 1), SOURCE
    )
    with pytest.raises(ValueError, match="collect one layer"):
        train_dictionary(several)


@pytest.fixture(scope="module")
def model() -> Any:
    return planted.planted()


@pytest.fixture(scope="module")
def train() -> list[tv.Episode]:
    return tv.sample_episodes(TASKS, 30, 4, seed=0, template=planted.TEMPLATE)


@pytest.fixture(scope="module")
def test() -> list[tv.Episode]:
    sampled = tv.sample_episodes(TASKS, 12, 4, seed=1, template=planted.TEMPLATE)
    return tv.zero_shot(sampled)


@pytest.fixture(scope="module")
def vectors(model: Any, train: list[tv.Episode]) -> tv.TaskVectors:
    return tv.task_vectors(tv.collect(model, train, layers=[1]))


@pytest.fixture(scope="module")
def known() -> Bare:
    """The planted model's features, of length one."""
    rows = torch.stack([planted.feature(*name) for name in NAMES])
    return Bare(rows / 2**0.5, least=0.05)


def test_a_dictionary_saves_and_loads_to_the_bit(
    model: Any, train: list[tv.Episode], tmp_path: Path
) -> None:
    tokens = residuals(model, train, 1, 300)
    made = train_dictionary(tokens, n_features=20, k=4, steps=10, batch_size=64, outliers=1e9)
    path = tmp_path / "made.safetensors"
    made.save(path)
    loaded = TopKDictionary.load(path, model)
    assert loaded.k == 4 and loaded.origin == made.origin == tokens.origin
    assert loaded.origin.weights == fingerprint(model)
    assert loaded.hook_name == "blocks.1.hook_resid_post" and repr(loaded) == repr(made)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert getattr(loaded, name).equal(getattr(made, name)), name
    assert [entry.name for entry in tmp_path.iterdir()] == ["made.safetensors"]
    replace(made, origin=replace(made.origin, weights="0" * 16)).save(path)
    with pytest.warns(UserWarning, match="trained on other weights"):
        TopKDictionary.load(path, model)
    replace(made, origin=replace(made.origin, model="other")).save(path)
    with pytest.raises(ValueError, match="belongs to 'other'"):
        TopKDictionary.load(path, model)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged, or not a dictionary"):
        TopKDictionary.load(path)
    with pytest.raises(ValueError, match="k is 99; it must be from 1 to .* 20"):
        replace(made, k=99)


def sorted_rows(rows: torch.Tensor) -> torch.Tensor:
    order = sorted(range(len(rows)), key=lambda row: rows[row].round(decimals=3).tolist())
    return rows[order]


def test_residuals_are_those_of_all_tokens_but_the_first(
    model: Any, train: list[tv.Episode]
) -> None:
    texts = ["q1 > a2 ; q3 >", "q0 >", train[0], "q5", train[1].prompt]
    expected = []
    for text in texts:
        prompt = text if isinstance(text, str) else text.prompt
        ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        kept: list[torch.Tensor] = []
        hook: Callable[..., None] = lambda x, hook=None, kept=kept: kept.append(x[0])  # noqa: E731
        with torch.no_grad():
            model.run_with_hooks(
                torch.tensor([ids]), fwd_hooks=[("blocks.2.hook_resid_post", hook)]
            )
        expected.append(kept[0][1:])
    every = torch.cat(expected)
    for batch_size in (1, 2, 16):
        found = residuals(model, texts, 2, batch_size=batch_size)
        assert found.values.shape == every.shape and len(found) == len(every)
        torch.testing.assert_close(
            sorted_rows(found.values), sorted_rows(every), atol=1e-3, rtol=1e-4
        )
    assert found.origin.layer == 2 and found.origin.hook == "resid_post"
    assert len(residuals(model, texts, 2, skip=0)) == len(every) + len(texts)
    few = residuals(model, texts, 2, 7, batch_size=1, seed=1)
    assert len(few) == 7 and few.values.equal(
        residuals(model, texts, 2, 7, batch_size=1, seed=1).values
    )
    assert not few.values.equal(residuals(model, texts, 2, 7, batch_size=1, seed=2).values)
    assert residuals(model, texts, 2, 7, dtype=torch.float16).values.dtype == torch.float16
    for arguments, told in (
        (([], 2), "texts is empty"),
        ((["q5"], 2), "more than 1 token"),
        ((texts, 9), "layer 9 is out of range"),
        ((texts, 2, 0), "n_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=told):
            residuals(model, *arguments)
    with pytest.raises(ValueError, match="without an axis of heads"):
        residuals(model, texts, 2, hook="z")


def test_a_planted_task_vector_is_the_planted_features(
    known: Bare, vectors: tv.TaskVectors
) -> None:
    found = decompose(vectors, known, 1)
    for index, task in enumerate(vectors.tasks):
        assert found.top(task, 1) == (number("task", index),)
        assert number("constant") in found.top(task)
    assert found.reconstructions["vector"].error.max() < 1e-3


def test_accuracy_by_features_is_that_of_sweeps_and_needs_the_tasks_feature(
    model: Any, test: list[tv.Episode], known: Bare, vectors: tv.TaskVectors
) -> None:
    found = decompose(vectors, known, 1)
    by_k = accuracy_by_features(model, test, found, ks=(0, 1, 2, 50))
    assert by_k.scores("vector").accuracy == by_k.scores("reconstruction").accuracy == 1
    assert by_k.scores("drop", 1).accuracy == 0 and by_k.scores("keep", 50).accuracy == 1
    for condition, make in (("keep", found.keep), ("drop", found.drop)):
        for k in (0, 1, 2, 50):
            sweep = tv.layer_sweep(model, test, make(k))
            assert by_k.scores(condition, k).correct.equal(sweep.scores_at(1).correct)
            torch.testing.assert_close(by_k.scores(condition, k).loss, sweep.scores_at(1).loss)
    assert by_k.baseline.correct.equal(tv.evaluate(model, test).correct)
    frame = by_k.to_frame()
    assert len(frame) == (3 + 3 * 4) * 3 and (frame.n == 12).all() and (frame.n_distinct == 6).all()
    row = frame[(frame.condition == "drop") & (frame.k == 1)]
    assert (row.accuracy == 0).all() and (row.low == 0).all() and (row.high < 0.5).all()
    assert "drop 1 0.00" in repr(by_k)
    with pytest.raises(ValueError, match="give different numbers"):
        accuracy_by_features(model, test, found, ks=(1, 1))
    with pytest.raises(ValueError, match="no condition"):
        by_k.scores("keep", 3)


def test_cleaning_keeps_the_planted_feature_and_drops_the_distractors(
    model: Any, test: list[tv.Episode], known: Bare, vectors: tv.TaskVectors
) -> None:
    own = planted.planted_directions()
    useless = 0.7 * planted.feature("group", 7) + 1.2 * planted.feature("partner", 1)
    values = own + 0.5 * own.roll(1, dims=0) + useless
    source = replace(vectors.source, mode="add")
    dirty = replace(vectors, values=values[:, None], source=source)
    losses: dict[str, list[float]] = {task: [] for task in vectors.tasks}
    clean = clean_vectors(
        model,
        test,
        dirty,
        known,
        1,
        steps=110,
        rate=0.04,
        report=lambda task, step, loss: losses[task].append(loss),
    )
    assert set(clean.l0_before.values()) == {4} and set(clean.l0.values()) == {1}
    for index, task in enumerate(clean.tasks):
        assert clean.active(task) == (number("task", index),)
        strength = clean.features[index, number("task", index)]
        torch.testing.assert_close(
            clean.vectors[task, 1], strength * own[index] / 2**0.5, atol=1e-5, rtol=1e-5
        )
        assert len(losses[task]) == 110
    assert clean.source.mode == "add" and isinstance(clean, tv.Injectable)
    sweep = tv.layer_sweep(model, test, clean)
    assert (sweep.at(1) == 1).all() and (sweep.baseline_accuracy == 0).all()
    frame = clean.to_frame()
    assert len(frame) == 3 and (frame.before - 2**0.5).abs().max() < 1e-5
    assert "shift 0 4 -> 1" in repr(clean)


def test_cleaning_where_vectors_replace_keeps_the_constant_too(
    model: Any, test: list[tv.Episode], known: Bare, vectors: tv.TaskVectors
) -> None:
    dirty = replace(vectors, values=vectors.values + 1.5 * planted.feature("answer", 2))
    own = [episode for episode in test if episode.task == "shift 1"]
    clean = clean_vectors(model, own, dirty, known, 1, steps=110, rate=0.04)
    assert clean.tasks == ("shift 1",) and clean.l0_before["shift 1"] >= 4
    assert set(clean.active("shift 1")) == {number("constant"), number("task", 1)}
    assert clean.source.mode == "replace"
    assert (tv.layer_sweep(model, own, clean).at(1) == 1).all()


def test_cleaning_only_shrinks_what_is_active_and_obeys_thresholds(
    model: Any, test: list[tv.Episode], known: Bare, vectors: tv.TaskVectors
) -> None:
    start = decompose(vectors, known, 1)
    none = clean_vectors(model, test, vectors, known, 1, steps=0)
    torch.testing.assert_close(none.features, start.features)
    torch.testing.assert_close(none.vectors.at(1), start.keep(99).at(1))
    jumping = Bare(known.rows, known.least)
    jumping.threshold = torch.full((len(NAMES),), 0.8)  # type: ignore[attr-defined]
    some = [episode for episode in test if episode.task == "shift 1"]
    plain, jumped = (
        clean_vectors(model, some, vectors, one, 1, steps=30, rate=0.02) for one in (known, jumping)
    )
    assert plain.tasks == jumped.tasks == ("shift 1",)
    for clean in (plain, jumped):
        assert set(clean.active("shift 1")) <= set(start.top("shift 1"))
    # Thirty steps of 0.02 take a useless feature from 1.41 to about 0.6, not to zero.
    assert plain.l0["shift 1"] > jumped.l0["shift 1"]
    left = jumped.features[jumped.features > 0]
    assert float(left.min()) > 0.8 > float(plain.features[plain.features > 0].min())
    with pytest.raises(ValueError, match="mode is 'project'"):
        clean_vectors(model, test, vectors, known, 1, mode="project")
    with pytest.raises(ValueError, match="l1 is -1"):
        clean_vectors(model, test, vectors, known, 1, l1=-1)
    with pytest.raises(ValueError, match="no active feature for the vectors of shift 0"):
        clean_vectors(model, test, vectors, Bare(-known.rows[:1]), 1)
    with pytest.raises(ValueError, match="layer 3 is not among"):
        clean_vectors(model, test, vectors, known, 3)
