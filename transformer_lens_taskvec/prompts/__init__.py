"""Prompts: templates, episodes, and how episodes are sampled."""

from transformer_lens_taskvec.prompts.episodes import (
    AnyEpisode,
    Episode,
    demo_sets_of,
    permute_mapping,
    shuffle_labels,
    with_instructions,
    zero_shot,
)
from transformer_lens_taskvec.prompts.sampling import sample_episodes, sample_splits
from transformer_lens_taskvec.prompts.templates import (
    ARROW,
    EXAMPLE_ARROW,
    QA,
    ChatTemplate,
    PromptTemplate,
)

__all__ = [
    "ARROW",
    "EXAMPLE_ARROW",
    "QA",
    "AnyEpisode",
    "ChatTemplate",
    "Episode",
    "PromptTemplate",
    "demo_sets_of",
    "permute_mapping",
    "sample_episodes",
    "sample_splits",
    "shuffle_labels",
    "with_instructions",
    "zero_shot",
]
