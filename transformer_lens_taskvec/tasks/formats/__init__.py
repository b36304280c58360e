"""Readers of public file formats: JSON pairs, CoNLL-U, the Penn Treebank."""
