"""The replication of Han et al. 2025: shots, instructions, finetuning, checkpoints."""

from transformer_lens_taskvec.paper.checkpoints import CheckpointStudy, over_checkpoints
from transformer_lens_taskvec.paper.finetune import (
    FinetuningStudy,
    LoraSettings,
    finetune_layers,
    finetuning_study,
)
from transformer_lens_taskvec.paper.instructions import (
    BITWISE_INSTRUCTIONS,
    POS_INSTRUCTIONS,
    InstructionStudy,
    prompting_study,
)
from transformer_lens_taskvec.paper.plots import plot_checkpoints, plot_prompting
from transformer_lens_taskvec.paper.shots import ShotStudy, run_study

__all__ = [
    "BITWISE_INSTRUCTIONS",
    "POS_INSTRUCTIONS",
    "CheckpointStudy",
    "FinetuningStudy",
    "InstructionStudy",
    "LoraSettings",
    "ShotStudy",
    "finetune_layers",
    "finetuning_study",
    "over_checkpoints",
    "plot_checkpoints",
    "plot_prompting",
    "prompting_study",
    "run_study",
]
