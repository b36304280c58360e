"""The figures: one style, colours that stay with their tasks, text that can be read."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

import transformer_lens_taskvec as tv
from transformer_lens_taskvec.plots import figure_of, save_figures, task_style

COLUMN = 3.4
"""Width of a column of a two-column paper, in inches."""


@pytest.fixture(scope="module")
def toy() -> Any:
    return tv.load_model("toy", device="cpu")


@pytest.fixture(scope="module")
def study(toy: Any) -> tv.paper.ShotStudy:
    return tv.paper.run_study(toy, tv.bitwise_tasks(), shots=(1, 2), n=12, n_vectors=12)


@pytest.fixture(scope="module")
def axes(toy: Any, study: tv.paper.ShotStudy) -> Iterator[dict[str, Any]]:
    """A figure of every kind that a language model gives, with what it draws from its own."""
    found = study.decodability[2]
    vectors = tv.task_vectors(found.activations)
    episodes = tv.sample_episodes(tv.bitwise_tasks(), 4, 2, seed=3)
    sweep = tv.layer_sweep(toy, tv.zero_shot(episodes), vectors, controls=True)
    told = {task: f"This is {task}: " for task in tv.bitwise_tasks()}
    prompting = tv.paper.prompting_study(toy, tv.bitwise_tasks(), told, n_shots=2, n=12)
    effects = tv.head_effects(toy, episodes, on=episodes, ablation="zero")
    drawn = {
        "sweep": tv.plot_layer_sweep(sweep),
        "decodability": tv.plot_decodability(found),
        "by shots": tv.plot_decodability(study.decodability),
        "pairs": tv.plot_pairwise(found, 1),
        "fit": tv.plot_td_vs_accuracy(study.fit),
        "steering": tv.plot_steering(study.steering[1]),
        "perturbation": tv.plot_perturbation(tv.perturbation_matrix(toy, episodes, vectors, 1)),
        "heads": tv.plot_head_effects(effects, task="AND"),
        "vectors": tv.plot_similarity(tv.analysis.similarity(vectors), layer=1),
        "embedding": tv.plot_embedding(found.activations, 1, method="pca"),
        "prompting": tv.paper.plot_prompting(prompting),
    }
    yield drawn
    plt.close("all")


def test_matplotlibs_settings_are_as_they_were(study: tv.paper.ShotStudy) -> None:
    before = dict(mpl.rcParams)
    ax = tv.plot_decodability(study.decodability[1])
    assert dict(mpl.rcParams) == before
    assert not ax.spines["top"].get_visible()
    plt.close(figure_of(ax))


def test_a_task_has_the_same_colour_in_every_figure(axes: dict[str, Any]) -> None:
    for name in ("sweep", "decodability", "fit", "embedding"):
        handles, labels = axes[name].get_legend_handles_labels()
        seen = {}
        for handle, label in zip(handles, labels, strict=True):
            colour = handle.get_facecolor()[0] if name == "embedding" else None
            if name == "embedding" or label in tv.bitwise_tasks():
                seen[label] = to_hex(handle.get_color() if colour is None else colour)
        expected = {
            task: task_style(index, task)["color"].lower()
            for index, task in enumerate(tv.bitwise_tasks())
            if task in seen
        }
        assert seen == expected and len(seen) >= 6, name
    assert task_style(0, "Null") == task_style(6, "Null")
    assert len({task_style(index)["color"] for index in range(12)}) == 12


def test_text_is_readable_at_column_width_and_nothing_is_cut(axes: dict[str, Any]) -> None:
    for name, ax in axes.items():
        figure = figure_of(ax)
        figure.canvas.draw()
        width, height = figure.get_size_inches()
        for text in figure.findobj(Text):
            size = text.get_fontsize() * min(1, COLUMN / width)
            assert size >= 5 or not text.get_text(), f"{name}: {text.get_text()!r}, {size:.1f}"
        drawn = figure.get_tightbbox()
        assert min(drawn.x0, drawn.y0) > -0.02, name
        assert drawn.x1 < width + 0.02 and drawn.y1 < height + 0.02, name


def test_figures_of_accuracies_give_the_number_of_queries(axes: dict[str, Any]) -> None:
    for name, n in {"sweep": 4, "fit": 12, "steering": 12, "prompting": 12}.items():
        texts = "\n".join(text.get_text() for text in figure_of(axes[name]).findobj(Text))
        assert f"n = {n} queries per task" in texts, name


def test_figures_are_saved_as_png_and_as_svg_with_text_and_the_same_each_time(
    study: tv.paper.ShotStudy, tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        figure = figure_of(tv.plot_decodability(study.decodability[1]))
        paths = save_figures({"td": figure}, tmp_path / folder)
        assert [path.name for path in paths] == ["td.png", "td.svg"]
        assert not plt.fignum_exists(figure.number)
    text = (tmp_path / "one" / "td.svg").read_text()
    assert ">Task decodability by layer</text>" in text and ">NAND</text>" in text
    assert (tmp_path / "two" / "td.svg").read_text() == text


def test_the_interactive_map_shows_every_prompt_at_every_layer(toy: Any) -> None:
    pytest.importorskip("plotly")
    episodes = tv.sample_episodes(tv.bitwise_tasks(), 3, 2, seed=0)
    activations = tv.collect(toy, episodes, layers=[0, 2, 3])
    figure = tv.explore_embedding(activations, episodes, method="pca")
    assert [frame.name for frame in figure.frames] == ["0", "2", "3"]
    texts = [text for trace in figure.data for text in trace.text]
    assert len(texts) == len(episodes)
    for episode, text in zip(episodes, texts, strict=True):
        last = episode.prompt.split("\n")[-1].replace(">", "&gt;")
        assert text.endswith(f"{last} <i>{episode.answer}</i>") and episode.task in text
    still = tv.plot_embedding(activations, 2, method="pca")
    for trace, points in zip(figure.frames[1].data, still.collections, strict=True):
        assert list(trace.x) == pytest.approx(points.get_offsets()[:, 0].tolist())
    plt.close(figure_of(still))
    with pytest.raises(ValueError, match="9 activations and 2 episodes"):
        tv.explore_embedding(tv.collect(toy, episodes[:9]), episodes[:2])


def test_without_plotly_the_error_says_what_to_install(
    study: tv.paper.ShotStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"transformer-lens-taskvec\[interactive\]"):
        tv.explore_embedding(study.decodability[1].activations)
