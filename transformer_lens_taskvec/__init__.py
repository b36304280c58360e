"""Task vectors in TransformerLens: extract, inject, ablate, score, and measure decodability."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformer_lens_taskvec.activations import Activations, Observe, collect
from transformer_lens_taskvec.analysis import (
    Comparison,
    Decodability,
    LayerSweep,
    PerturbationMatrix,
    SteeringEffect,
    compare,
    layer_sweep,
    perturbation_matrix,
    steering_effect,
    task_decodability,
    td_vs_accuracy,
)
from transformer_lens_taskvec.benchmark import compare_methods
from transformer_lens_taskvec.controls import control_vectors
from transformer_lens_taskvec.experiment import Experiment, run_experiment
from transformer_lens_taskvec.generation import generate
from transformer_lens_taskvec.interventions import Intervention, ablate, inject
from transformer_lens_taskvec.loading import load_hf_model, load_model
from transformer_lens_taskvec.models.bridge import bridge_from_hf
from transformer_lens_taskvec.planning import Plan, plan
from transformer_lens_taskvec.plots import (
    explore_embedding,
    plot_attribution,
    plot_decodability,
    plot_embedding,
    plot_fidelity,
    plot_head_effects,
    plot_layer_sweep,
    plot_methods,
    plot_pairwise,
    plot_perturbation,
    plot_pooling_robustness,
    plot_progressive,
    plot_similarity,
    plot_steering,
    plot_td_vs_accuracy,
    plot_vocabulary,
)
from transformer_lens_taskvec.prompts import (
    ARROW,
    EXAMPLE_ARROW,
    QA,
    Episode,
    PromptTemplate,
    sample_episodes,
    sample_splits,
    shuffle_labels,
    with_instructions,
    zero_shot,
)
from transformer_lens_taskvec.scoring import Scores, evaluate, evaluate_many
from transformer_lens_taskvec.tasks import (
    Example,
    Task,
    bitwise_tasks,
    find_tasks,
    load_mapping,
    mapping_task,
    pos_tasks,
)
from transformer_lens_taskvec.vectors import (
    HeadEffects,
    Injectable,
    TaskVectors,
    function_vectors,
    head_effects,
    task_vectors,
)

if TYPE_CHECKING:
    from transformer_lens_taskvec import lab as lab
    from transformer_lens_taskvec import paper as paper

__version__ = "0.1.0"

__all__ = [
    "ARROW",
    "EXAMPLE_ARROW",
    "QA",
    "Activations",
    "Comparison",
    "Decodability",
    "Episode",
    "Example",
    "Experiment",
    "HeadEffects",
    "Injectable",
    "Intervention",
    "LayerSweep",
    "Observe",
    "PerturbationMatrix",
    "Plan",
    "PromptTemplate",
    "Scores",
    "SteeringEffect",
    "Task",
    "TaskVectors",
    "ablate",
    "bitwise_tasks",
    "bridge_from_hf",
    "collect",
    "compare",
    "compare_methods",
    "control_vectors",
    "evaluate",
    "evaluate_many",
    "explore_embedding",
    "find_tasks",
    "function_vectors",
    "generate",
    "head_effects",
    "inject",
    "lab",
    "layer_sweep",
    "load_hf_model",
    "load_mapping",
    "load_model",
    "mapping_task",
    "paper",
    "perturbation_matrix",
    "plan",
    "plot_attribution",
    "plot_decodability",
    "plot_embedding",
    "plot_fidelity",
    "plot_head_effects",
    "plot_layer_sweep",
    "plot_methods",
    "plot_pairwise",
    "plot_perturbation",
    "plot_pooling_robustness",
    "plot_progressive",
    "plot_similarity",
    "plot_steering",
    "plot_td_vs_accuracy",
    "plot_vocabulary",
    "pos_tasks",
    "run_experiment",
    "sample_episodes",
    "sample_splits",
    "shuffle_labels",
    "steering_effect",
    "task_decodability",
    "task_vectors",
    "td_vs_accuracy",
    "with_instructions",
    "zero_shot",
]


def __getattr__(name: str) -> Any:
    """Return the replication of the paper or the lab, imported on first use."""
    if name in ("lab", "paper"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
