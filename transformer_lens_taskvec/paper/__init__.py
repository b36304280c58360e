"""The replication of Han et al. 2025: shots, instructions, finetuning, checkpoints."""

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
from transformer_lens_taskvec.paper.runner import run_paper_study
from transformer_lens_taskvec.paper.shots import Study, run_study

__all__ = [
    "BITWISE_INSTRUCTIONS",
    "POS_INSTRUCTIONS",
    "FinetuningStudy",
    "LoraSettings",
    "OverCheckpoints",
    "PromptingStudy",
    "Study",
    "finetune_layers",
    "finetuning_study",
    "over_checkpoints",
    "prompting_study",
    "run_paper_study",
    "run_study",
]
