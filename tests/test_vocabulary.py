"""Vectors as tokens, and their cosines, against the same written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import planted
import pytest
import torch
import zoo
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import cdist

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.activations import Source
from transformer_lens_taskvec.analysis.cosines import similarity
from transformer_lens_taskvec.analysis.lenses import Vocabulary, vocabulary
from transformer_lens_taskvec.models.protocol import fingerprint, hook_name, model_name
from transformer_lens_taskvec.plots.vectors import plot_similarity, plot_vocabulary
from transformer_lens_taskvec.vectors.base import LayerwiseVectors

pytestmark = pytest.mark.model
N = planted.N_QUERIES
ANSWERS = {f"a{i}" for i in range(N)}


@pytest.fixture(scope="module")
def ring() -> Any:
    return planted.planted()


@pytest.fixture(scope="module")
def toy() -> Any:
    return tv.load_model("toy", device="cpu")


@pytest.fixture(scope="module")
def toys(toy: Any) -> tv.TaskVectors:
    episodes = tv.sample_episodes(tv.bitwise_tasks(null=False), 10, 4, seed=0)
    return tv.task_vectors(tv.collect(toy, episodes))


def made(model: Any, values: torch.Tensor, mode: str, hook: str = "resid_post") -> tv.TaskVectors:
    """Vectors of given values, at the layers from 0."""
    names = tuple(f"task {i}" for i in range(len(values)))
    source = Source(model_name(model), hook, -1, "", False, mode, weights=fingerprint(model))
    return tv.TaskVectors(values, names, tuple(range(values.shape[1])), source)


def layer_norm(rows: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    centred = rows - rows.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def rms_norm(model: Any, rows: torch.Tensor) -> torch.Tensor:
    final = model.original_model.model.norm
    scale = (rows.square().mean(dim=-1, keepdim=True) + final.variance_epsilon).sqrt()
    return rows / scale * final.weight.detach()


def check_logits(found: Vocabulary, expected: torch.Tensor, k: int, **where: str) -> None:
    """The ids, logits and z of the ends of ``expected [task, layer, vocab]``."""
    table = found.table
    for column, value in {"vector": "vectors", "lens": "logit", **where}.items():
        table = table[table[column] == value]
    for sign, largest in (("+", True), ("-", False)):
        rows = table[table.sign == sign]
        shape = (*expected.shape[:2], k)
        logits = torch.tensor(rows.logit.to_numpy()).reshape(shape).float()
        ids = torch.tensor(rows.id.to_numpy()).reshape(shape)
        z = torch.tensor(rows.z.to_numpy()).reshape(shape).float()
        ends = expected.topk(k, dim=-1, largest=largest).values
        close = {"atol": 2e-4, "rtol": 2e-4}
        torch.testing.assert_close(logits, ends, **close)
        torch.testing.assert_close(expected.gather(-1, ids), ends, **close)
        mean, spread = expected.mean(-1, keepdim=True), expected.std(-1, keepdim=True)
        torch.testing.assert_close(z, (ends - mean) / spread, atol=1e-3, rtol=1e-3)


def test_planted_directions_promote_the_planted_answers_and_no_others(ring: Any) -> None:
    directions = torch.stack([planted.feature("out", i) for i in range(N)])
    pairs = torch.stack([directions[i] + directions[(i + 2) % N] for i in range(N)])
    vectors = made(ring, torch.stack([pairs, -pairs], dim=1), "add")
    found = vocabulary(vectors, ring, k=2)
    for i, task in enumerate(vectors.tasks):
        wanted = {f"a{i}", f"a{(i + 2) % N}"}
        assert set(found.tokens(task, 0)) == wanted == set(found.tokens(task, 1, sign="-"))
    W_U = ring.original_model.lm_head.weight.detach().T
    check_logits(found, layer_norm(vectors.values) @ W_U, k=2)
    assert found.reads == "differences" and found.table.probability.isna().all()
    kept = found.to_json()
    assert len(kept["tokens"]) == len(found.table) and kept["tokens"][0]["probability"] is None


@pytest.mark.filterwarnings("ignore:.*distinct inputs")
def test_answers_are_said_from_the_decoding_layer_on_and_not_before(ring: Any) -> None:
    halves = {
        name: tv.mapping_task(name, {f"q{i}": f"a{i}" for i in inputs})
        for name, inputs in {"low": (0, 1, 2), "high": (3, 4, 5)}.items()
    }
    episodes = tv.sample_episodes(halves, 30, 2, seed=0, template=planted.TEMPLATE)
    vectors = tv.task_vectors(tv.collect(ring, episodes))
    said = {"low": {"a0", "a1", "a2"}, "high": {"a3", "a4", "a5"}}
    for centred in (False, True):
        found = vocabulary(vectors, ring, centred=centred, k=3)
        for task, answers in said.items():
            for layer in vectors.layers:
                assert (set(found.tokens(task, layer)) == answers) == (layer >= planted.READER[0])
        if centred:
            assert set(found.tokens("low", 4, sign="-")) == said["high"]
    states = vocabulary(vectors, ring, k=3).table
    before = states[(states.layer < planted.READER[0]) & (states.vector == "vectors")]
    assert set(before[(before["rank"] == 1) & (before.sign == "+")].token) == {">"}


def test_a_state_gives_the_logits_that_the_model_gives_with_it(
    model: Any, vectors: tv.TaskVectors
) -> None:
    found = vocabulary(vectors, model, [0, 2], k=5)
    last = hook_name("resid_post", int(model.cfg.n_layers) - 1)
    tokens = torch.tensor([[5, 9, 11]])
    expected = []
    for task in vectors.tasks:
        for layer in (0, 2):
            edit = tv.inject(vectors[task, layer], int(model.cfg.n_layers) - 1)
            assert edit.name == last
            with torch.no_grad():
                expected.append(model.run_with_hooks(tokens, fwd_hooks=[edit])[0, -1])
    logits = torch.stack(expected).reshape(len(vectors.tasks), 2, -1)
    check_logits(found, logits, k=5)
    rows = found.table[(found.table.vector == "vectors") & (found.table.sign == "+")]
    shares = logits.softmax(-1).topk(5, dim=-1).values.flatten()
    np.testing.assert_allclose(rows.probability, shares, rtol=1e-3)
    assert found.layers == (0, 2) and list(dict.fromkeys(rows["rank"])) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("hook", ["resid_post", "attn_out", "mlp_out"])
def test_what_is_added_is_read_without_what_is_the_same_for_all(
    model: Any, episodes: list[tv.Episode], hook: str
) -> None:
    few = tv.collect(model, episodes, hook=hook)
    vectors = tv.task_vectors(few)
    if hook == "resid_post":
        vectors = replace(vectors, source=replace(vectors.source, mode="add"))
    found = vocabulary(vectors, model, k=4)
    assert found.reads == "differences"
    eps = float(model.cfg.eps)
    with torch.no_grad():
        unit = vectors.values / (vectors.values.square().mean(-1, keepdim=True) + eps).sqrt()
        expected = (unit * model.ln_final.w.detach()) @ model.W_U.detach()
    check_logits(found, expected, k=4)


def test_a_final_cap_is_the_models(tokenizer: Any, episodes: list[tv.Episode]) -> None:
    gemma = zoo.bridge("gemma2", tokenizer, final_logit_softcapping=0.5)
    vectors = tv.task_vectors(tv.collect(gemma, episodes))
    edit = vectors.inject(vectors.tasks[0], 2)
    with torch.no_grad():
        expected = gemma.run_with_hooks(torch.tensor([[5, 9]]), fwd_hooks=edit)[0, -1]
    try:
        found = vocabulary(vectors, gemma, 2, k=5)
    except ValueError as refused:  # TransformerLens 3.9
        assert "standard deviations" in str(refused)
        return
    own = found.table[(found.table.task == vectors.tasks[0]) & (found.table.vector == "vectors")]
    np.testing.assert_allclose(own.logit[own.sign == "+"], expected.topk(5).values, rtol=1e-3)


def test_controls_are_read_in_the_same_way(toy: Any, toys: tv.TaskVectors) -> None:
    random = tv.control_vectors(toys, kinds=["random"], seed=5)["random"]
    found = vocabulary(toys, toy, k=3, seed=5)
    assert found.vectors == ("vectors", "random")
    W_U = toy.original_model.lm_head.weight.detach().T
    check_logits(found, rms_norm(toy, random.values) @ W_U, k=3, vector="random")
    given = vocabulary(toys, toy, k=3, controls={"chance": random, "same": toys})
    assert given.vectors == ("vectors", "chance", "same")
    assert given.tokens("XOR", 1, vector="chance") == found.tokens("XOR", 1, vector="random")
    assert given.tokens("XOR", 1, vector="same") == found.tokens("XOR", 1)
    assert (given.shared("same").shared == 1).all()
    for row in given.shared("chance").itertuples():
        cell = {"task": row.task, "layer": row.layer, "sign": row.sign}
        both = [set(given.tokens(vector=name, **cell)) for name in ("vectors", "chance")]
        assert row.shared == pytest.approx(len(both[0] & both[1]) / 3)
    with pytest.raises(ValueError, match="control is 'vectors'; there are: chance, same"):
        given.shared("vectors")
    centred = vocabulary(toys, toy, k=3, controls={"chance": random}, centred=True)
    left = random.values - random.values.mean(dim=0)
    check_logits(centred, rms_norm(toy, left) @ W_U, k=3, vector="chance")
    assert vocabulary(toys, toy, k=3, controls={}).vectors == ("vectors",)


def test_the_jacobian_lens_reads_through_its_matrices(toy: Any, toys: tv.TaskVectors) -> None:
    from transformer_lens.tools.analysis import JacobianLens

    generator = torch.Generator().manual_seed(0)
    matrices = {layer: torch.randn(64, 64, generator=generator) for layer in range(3)}
    lens = JacobianLens(matrices, n_prompts=1, d_model=64)
    found = vocabulary(toys, toy, jacobian=lens, k=3)
    assert found.lenses == ("logit", "jacobian")
    W_U = toy.original_model.lm_head.weight.detach().T
    moved = [toys.at(layer) @ matrices[layer].T for layer in range(3)] + [toys.at(3)]
    check_logits(found, rms_norm(toy, torch.stack(moved, 1)) @ W_U, k=3, lens="jacobian")
    check_logits(found, rms_norm(toy, toys.values) @ W_U, k=3)
    # What enters a block is what the block before puts out.
    entering = replace(toys, source=replace(toys.source, hook="resid_pre"))
    before = vocabulary(entering, toy, [1, 2, 3], jacobian=lens, k=3)
    moved = [toys.at(layer) @ matrices[layer - 1].T for layer in (1, 2, 3)]
    check_logits(before, rms_norm(toy, torch.stack(moved, 1)) @ W_U, k=3, lens="jacobian")
    with pytest.raises(ValueError, match="no matrix for the outputs of the blocks \\[-1\\]"):
        vocabulary(entering, toy, jacobian=lens)
    inside = replace(toys, source=replace(toys.source, hook="attn_out"))
    with pytest.raises(ValueError, match="'attn_out' is followed by a part of its block"):
        vocabulary(inside, toy, jacobian=lens)


@pytest.mark.parametrize("hook", ["z", "q", "k", "v", "pattern", "mlp.hook_post"])
def test_hooks_beside_the_residual_stream_are_refused(
    toy: Any, toys: tv.TaskVectors, hook: str
) -> None:
    other = replace(toys, source=replace(toys.source, hook=hook))
    with pytest.raises(ValueError, match=r"the residual stream|\[batch, head, query, key\]"):
        vocabulary(other, toy)


def test_what_cannot_be_read_is_refused(
    toy: Any, toys: tv.TaskVectors, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = replace(toys, values=toys.values[:1], tasks=toys.tasks[:1])
    cases: list[tuple[str, Callable[[], object]]] = [
        ("layer is 7; name one", lambda: vocabulary(toys, toy, 7)),
        ("layer is \\[\\]", lambda: vocabulary(toys, toy, [])),
        ("k is 0; it must be from 1", lambda: vocabulary(toys, toy, k=0)),
        ("k is 51; it must be from 1 to half the 101", lambda: vocabulary(toys, toy, k=51)),
        ("centred is True, and there is one task", lambda: vocabulary(some, toy, centred=True)),
        ("no vectors of AND", lambda: vocabulary(toys, toy, k=2, controls={"few": _without(toys)})),
        ("is named 'vectors'", lambda: vocabulary(toys, toy, controls={"vectors": toys})),
        (
            "the control 'added' has the mode 'add'",
            lambda: vocabulary(toys, toy, controls={"added": _moded(toys, "add")}),
        ),
        ("of their own: \\[\\]", lambda: vocabulary(LayerwiseVectors(toys), toy)),
        (
            "takes \\[Intervention.*give TaskVectors",
            lambda: vocabulary(LayerwiseVectors(toys, (1,)), toy, 1),
        ),
        (
            "these vectors come from 'other'",
            lambda: vocabulary(replace(toys, source=replace(toys.source, model="other")), toy),
        ),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    # A model that does more than its unembedding, of which nothing tells.
    double = toy.ln_final.register_forward_hook(lambda module, args, out: 2 * out)
    try:
        assert vocabulary(toys, toy, k=2).tokens("XOR", 3)  # as the model does it, so it is read
    finally:
        double.remove()
    monkeypatch.setattr(toy, "tokenizer", None)
    with pytest.raises(ValueError, match="no tokens with texts"):
        vocabulary(toys, toy)


def test_a_model_with_another_way_to_its_logits_is_refused(tokenizer: Any) -> None:
    opt = zoo.bridge("opt", tokenizer)
    episodes = tv.sample_episodes(tv.find_tasks(["en_fr", "antonyms"]), 2, 1, seed=0)
    vectors = tv.task_vectors(tv.collect(opt, episodes))
    assert vocabulary(vectors, opt, 1, k=2).layers == (1,)

    def turned(module: Any, args: Any, output: Any) -> Any:
        output.logits = output.logits.roll(1, dims=-1)
        return output

    handle = opt.original_model.register_forward_hook(turned)
    before = fingerprint(opt)
    try:
        with pytest.raises(ValueError, match="cannot be read as tokens: its logits are not"):
            vocabulary(vectors, opt, 1, k=2)
    finally:
        handle.remove()
    assert fingerprint(opt) == before


def _without(vectors: tv.TaskVectors) -> tv.TaskVectors:
    return replace(vectors, values=vectors.values[1:], tasks=vectors.tasks[1:])


def _moded(vectors: tv.TaskVectors, mode: str) -> tv.TaskVectors:
    return replace(vectors, source=replace(vectors.source, mode=mode))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 1 - cdist(a.astype(float), b.astype(float), metric="cosine")


@pytest.mark.parametrize("centred", [True, False])
def test_cosines_are_scipys(toys: tv.TaskVectors, centred: bool) -> None:
    random = tv.control_vectors(toys, kinds=["random"])["random"]
    own, crossed = (similarity(toys, other, centred=centred) for other in (None, random))
    values, others = toys.values.numpy(), random.values.numpy()
    if centred:
        values, others = values - values.mean(axis=0), others - others.mean(axis=0)
    for place, layer in enumerate(toys.layers):
        here, there = values[:, place], others[:, place]
        np.testing.assert_allclose(own.at(layer), cosines(here, here), atol=1e-5)
        np.testing.assert_allclose(crossed.at(layer), cosines(here, there), atol=1e-5)
        tree = linkage(here.astype(float), "average", metric="cosine", optimal_ordering=True)
        order = tuple(toys.tasks[index] for index in leaves_list(tree))
        assert own.order(layer) in (order, order[::-1])
        assert crossed.order(layer) == own.order(layer)
    for index, task in enumerate(toys.tasks):
        np.testing.assert_allclose(own.of(task), cosines(values[index], values[index]), atol=1e-5)
        np.testing.assert_allclose(
            crossed.of(task), cosines(values[index], others[index]), atol=1e-5
        )
    np.testing.assert_allclose(own.norms, np.linalg.norm(toys.values.numpy(), axis=-1), rtol=1e-6)
    np.testing.assert_allclose(crossed.other_norms, own.norms, rtol=1e-5)  # of equal length


def test_vectors_are_compared_by_the_names_of_tasks_and_layers(toys: tv.TaskVectors) -> None:
    turned = replace(
        toys,
        values=toys.values.flip(0, 1),
        tasks=toys.tasks[::-1],
        layers=toys.layers[::-1],
    )
    found = similarity(toys, turned)
    assert found.crossed and found.by_layer.diagonal(dim1=1, dim2=2).min() > 1 - 1e-5
    assert found.by_task.diagonal(dim1=1, dim2=2).min() > 1 - 1e-5
    assert "mean cosine of a task with itself 1.00" in repr(found)
    frame = similarity(toys).to_frame()
    n_tasks, n_layers = len(toys.tasks), len(toys.layers)
    assert len(frame) == n_layers * n_tasks**2 + n_tasks * n_layers**2
    own = similarity(toys)
    [row] = frame[
        (frame.task == "XOR") & (frame.other_task == "OR") & (frame.layer == 1)
    ].itertuples()
    at = own.at(1)[toys.tasks.index("XOR"), toys.tasks.index("OR")]
    assert row.other_layer == 1 and row.cosine == pytest.approx(float(at))


def test_where_nothing_sets_tasks_apart_there_is_no_cosine(ring: Any) -> None:
    same = torch.randn(1, 1, 8).expand(3, 1, 8)
    apart = torch.randn(3, 1, 8)
    vectors = made(ring, torch.cat([same, apart, torch.zeros(3, 1, 8)], dim=1), "replace")
    found = similarity(vectors)
    assert found.at(0).isnan().all() and found.at(2).isnan().all()
    assert not found.at(1).isnan().any() and set(found.order(0)) == set(vectors.tasks)
    assert found.to_json()["by_layer"][0][0][1] is None
    assert similarity(vectors, centred=False).at(0).min() > 1 - 1e-5


def test_the_planted_tasks_are_as_far_apart_as_they_were_planted(ring: Any) -> None:
    directions = planted.planted_directions()
    found = similarity(made(ring, directions[:, None], "add"))
    apart = ~torch.eye(3, dtype=torch.bool)
    torch.testing.assert_close(found.at(0)[apart], torch.full((6,), -0.5))  # -1 / (n - 1)
    plain = similarity(made(ring, directions[:, None], "add"), centred=False)
    torch.testing.assert_close(plain.at(0), torch.eye(3))
    assert plain.norms.flatten().tolist() == pytest.approx([2**0.5] * 3)


def test_what_cannot_be_compared_is_refused(toys: tv.TaskVectors, unchecked: None) -> None:
    two = replace(toys, values=toys.values[:2], tasks=toys.tasks[:2])
    cases: list[tuple[str, Callable[[], object]]] = [
        ("centred is True for 2 task", lambda: similarity(two)),
        ("other has no vectors of AND", lambda: similarity(toys, _without(toys))),
        (
            "other has vectors of width 32",
            lambda: similarity(toys, replace(toys, values=toys.values[..., :32])),
        ),
        (
            "other comes from 'else'",
            lambda: similarity(toys, replace(toys, source=replace(toys.source, model="else"))),
        ),
        ("no vector per task and layer", lambda: similarity(LayerwiseVectors(toys))),
        ("no vectors of task 'NOPE'", lambda: similarity(toys).of("NOPE")),
        ("layer 9 is not among", lambda: similarity(toys).order(9)),
        (
            "layer is 1 and task 'XOR'",
            lambda: plot_similarity(similarity(toys), layer=1, task="XOR"),
        ),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert similarity(two, centred=False).order(1) == two.tasks


def test_figures_show_the_tokens_and_the_cosines(toy: Any, toys: tv.TaskVectors) -> None:
    found = vocabulary(toys, toy, k=2)
    ax = plot_vocabulary(found, n=2)
    texts = [text.get_text() for text in ax.texts]
    wanted = [
        "  ".join(token.replace(" ", "␣") for token in found.tokens(task, layer))
        for layer in toys.layers
        for task in toys.tasks
    ]
    assert texts == [text.replace("\n", "\\n") for text in wanted]
    first = found.table[(found.table["rank"] == 1) & (found.table.sign == "+")]
    [own, control] = first[(first.task == "OR") & (first.layer == 3)].z
    shade = ax.images[0].get_array()[3, toys.tasks.index("OR")]
    assert shade == pytest.approx(own - control)
    beside = plot_vocabulary(found, task="XOR", layers=[3], sign="-")
    assert [tick.get_text() for tick in beside.get_xticklabels()] == ["vectors", "random"]
    with pytest.raises(ValueError, match="task is 'NOPE'"):
        plot_vocabulary(found, task="NOPE")
    alike = similarity(toys)
    ax = plot_similarity(alike, layer=1)
    order = alike.order(1)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(order)
    first, second = (toys.tasks.index(task) for task in order[:2])
    shown = float(ax.texts[1].get_text())
    assert shown == pytest.approx(float(alike.at(1)[first, second]), abs=0.006)
    plt.close("all")
