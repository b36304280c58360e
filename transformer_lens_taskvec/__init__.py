"""Task vectors in TransformerLens: extract, inject, ablate, score, and measure decodability."""

from transformer_lens_taskvec.analyses import (
    LayerSweep,
    PerturbationMatrix,
    SteeringEffect,
    layer_sweep,
    perturbation_matrix,
    steering_effect,
)
from transformer_lens_taskvec.collect import Activations, collect
from transformer_lens_taskvec.decodability import Decodability, task_decodability
from transformer_lens_taskvec.evaluate import Scores, evaluate, evaluate_many
from transformer_lens_taskvec.experiment import Experiment, run_experiment
from transformer_lens_taskvec.generate import generate
from transformer_lens_taskvec.heads import (
    FunctionVector,
    HeadEffects,
    function_vector,
    head_effects,
)
from transformer_lens_taskvec.interventions import Intervention, ablate, inject
from transformer_lens_taskvec.models import HookedModel, load_model
from transformer_lens_taskvec.plots import (
    plot_decodability,
    plot_embedding,
    plot_head_effects,
    plot_layer_sweep,
    plot_perturbation,
)
from transformer_lens_taskvec.prompts import (
    ARROW,
    EXAMPLE_ARROW,
    QA,
    Episode,
    PromptTemplate,
    sample_episodes,
    sample_splits,
    zero_shot,
)
from transformer_lens_taskvec.tasks import (
    Example,
    Task,
    algorithmic_tasks,
    all_tasks,
    bitwise_tasks,
    find_tasks,
    knowledge_tasks,
    linguistic_tasks,
    load_conllu,
    load_mapping,
    load_treebank,
    mapping_task,
    pos_tasks,
    translation_tasks,
)
from transformer_lens_taskvec.vectors import TaskVectors, task_vectors

__version__ = "0.1.0"

__all__ = [
    "ARROW",
    "EXAMPLE_ARROW",
    "QA",
    "Activations",
    "Decodability",
    "Episode",
    "Example",
    "Experiment",
    "FunctionVector",
    "HeadEffects",
    "HookedModel",
    "Intervention",
    "LayerSweep",
    "PerturbationMatrix",
    "PromptTemplate",
    "Scores",
    "SteeringEffect",
    "Task",
    "TaskVectors",
    "ablate",
    "algorithmic_tasks",
    "all_tasks",
    "bitwise_tasks",
    "collect",
    "evaluate",
    "evaluate_many",
    "find_tasks",
    "function_vector",
    "generate",
    "head_effects",
    "inject",
    "knowledge_tasks",
    "layer_sweep",
    "linguistic_tasks",
    "load_conllu",
    "load_mapping",
    "load_model",
    "load_treebank",
    "mapping_task",
    "perturbation_matrix",
    "plot_decodability",
    "plot_embedding",
    "plot_head_effects",
    "plot_layer_sweep",
    "plot_perturbation",
    "pos_tasks",
    "run_experiment",
    "sample_episodes",
    "sample_splits",
    "steering_effect",
    "task_decodability",
    "task_vectors",
    "translation_tasks",
    "zero_shot",
]
