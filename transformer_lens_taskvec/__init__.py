"""Task vectors in TransformerLens: extract, inject, ablate, score, and measure decodability."""

from transformer_lens_taskvec.activations import Activations, collect
from transformer_lens_taskvec.analysis.comparison import Comparison, compare
from transformer_lens_taskvec.analysis.decodability import (
    Decodability,
    DecodabilityNull,
    decodability_sensitivity,
    task_decodability,
)
from transformer_lens_taskvec.analysis.layer_sweep import LayerSweep, layer_sweep
from transformer_lens_taskvec.analysis.perturbation import PerturbationMatrix, perturbation_matrix
from transformer_lens_taskvec.analysis.steering import SteeringEffect, steering_effect
from transformer_lens_taskvec.analysis.td_accuracy import Fit, td_vs_accuracy
from transformer_lens_taskvec.controls import controls
from transformer_lens_taskvec.experiment import Experiment, run_experiment
from transformer_lens_taskvec.generation import generate
from transformer_lens_taskvec.interventions.intervention import Intervention, ablate, inject
from transformer_lens_taskvec.loading import load_hf_model, load_model
from transformer_lens_taskvec.models.bridge import boot
from transformer_lens_taskvec.models.protocol import HookedModel
from transformer_lens_taskvec.paper.checkpoints import OverCheckpoints, over_checkpoints
from transformer_lens_taskvec.paper.finetune import (
    FinetuningStudy,
    LoraSettings,
    finetune_layers,
    finetuning_study,
)
from transformer_lens_taskvec.paper.instructions import (
    BITWISE_INSTRUCTIONS,
    POS_INSTRUCTIONS,
    PromptingStudy,
    prompting_study,
)
from transformer_lens_taskvec.paper.shots import Study, run_study
from transformer_lens_taskvec.plots import (
    explore_embedding,
    plot_checkpoints,
    plot_decodability,
    plot_embedding,
    plot_head_effects,
    plot_layer_sweep,
    plot_oracles,
    plot_pairwise,
    plot_perturbation,
    plot_prompting,
    plot_steering,
    plot_td_vs_accuracy,
    plot_training,
    plot_vectors,
)
from transformer_lens_taskvec.prompts import (
    ARROW,
    EXAMPLE_ARROW,
    QA,
    Episode,
    PromptTemplate,
    sample_episodes,
    sample_splits,
    with_instructions,
    zero_shot,
)
from transformer_lens_taskvec.scoring import Scores, collect_and_evaluate, evaluate, evaluate_many
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
from transformer_lens_taskvec.tasks.pos import split_pos_tasks
from transformer_lens_taskvec.vectors.base import TaskVectors
from transformer_lens_taskvec.vectors.heads import (
    FunctionVector,
    HeadEffects,
    function_vector,
    head_effects,
)
from transformer_lens_taskvec.vectors.means import task_vectors

__version__ = "0.1.0"

__all__ = [
    "ARROW",
    "BITWISE_INSTRUCTIONS",
    "EXAMPLE_ARROW",
    "POS_INSTRUCTIONS",
    "QA",
    "Activations",
    "Comparison",
    "Decodability",
    "DecodabilityNull",
    "Episode",
    "Example",
    "Experiment",
    "FinetuningStudy",
    "Fit",
    "FunctionVector",
    "HeadEffects",
    "HookedModel",
    "Intervention",
    "LayerSweep",
    "LoraSettings",
    "OverCheckpoints",
    "PerturbationMatrix",
    "PromptTemplate",
    "PromptingStudy",
    "Scores",
    "SteeringEffect",
    "Study",
    "Task",
    "TaskVectors",
    "ablate",
    "algorithmic_tasks",
    "all_tasks",
    "bitwise_tasks",
    "boot",
    "collect",
    "collect_and_evaluate",
    "compare",
    "controls",
    "decodability_sensitivity",
    "evaluate",
    "evaluate_many",
    "explore_embedding",
    "find_tasks",
    "finetune_layers",
    "finetuning_study",
    "function_vector",
    "generate",
    "head_effects",
    "inject",
    "knowledge_tasks",
    "layer_sweep",
    "linguistic_tasks",
    "load_conllu",
    "load_hf_model",
    "load_mapping",
    "load_model",
    "load_treebank",
    "mapping_task",
    "over_checkpoints",
    "perturbation_matrix",
    "plot_checkpoints",
    "plot_decodability",
    "plot_embedding",
    "plot_head_effects",
    "plot_layer_sweep",
    "plot_oracles",
    "plot_pairwise",
    "plot_perturbation",
    "plot_prompting",
    "plot_steering",
    "plot_td_vs_accuracy",
    "plot_training",
    "plot_vectors",
    "pos_tasks",
    "prompting_study",
    "run_experiment",
    "run_study",
    "sample_episodes",
    "sample_splits",
    "split_pos_tasks",
    "steering_effect",
    "task_decodability",
    "task_vectors",
    "td_vs_accuracy",
    "translation_tasks",
    "with_instructions",
    "zero_shot",
]
