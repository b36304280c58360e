"""Tasks: built-in ones, makers of new ones, and readers of public formats."""

from transformer_lens_taskvec.tasks.algorithmic import algorithmic_tasks
from transformer_lens_taskvec.tasks.base import NULL, Example, MappingTask, Task, mapping_task
from transformer_lens_taskvec.tasks.bijections import bijection_task
from transformer_lens_taskvec.tasks.bitwise import bitwise_tasks
from transformer_lens_taskvec.tasks.code import code_tasks
from transformer_lens_taskvec.tasks.formats.conllu import load_conllu
from transformer_lens_taskvec.tasks.formats.json_pairs import load_mapping
from transformer_lens_taskvec.tasks.formats.treebank import load_treebank
from transformer_lens_taskvec.tasks.mappings import (
    knowledge_tasks,
    linguistic_tasks,
    translation_tasks,
)
from transformer_lens_taskvec.tasks.pos import pos_tasks, split_pos_tasks
from transformer_lens_taskvec.tasks.registry import FAMILIES, Family, all_tasks, find_tasks
from transformer_lens_taskvec.tasks.sentences import Sentence, generate_sentences
from transformer_lens_taskvec.tasks.shared import with_same_inputs

__all__ = [
    "FAMILIES",
    "NULL",
    "Example",
    "Family",
    "MappingTask",
    "Sentence",
    "Task",
    "algorithmic_tasks",
    "all_tasks",
    "bijection_task",
    "bitwise_tasks",
    "code_tasks",
    "find_tasks",
    "generate_sentences",
    "knowledge_tasks",
    "linguistic_tasks",
    "load_conllu",
    "load_mapping",
    "load_treebank",
    "mapping_task",
    "pos_tasks",
    "split_pos_tasks",
    "translation_tasks",
    "with_same_inputs",
]
