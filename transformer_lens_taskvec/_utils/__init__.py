"""Shared helpers: displayed tables, atomic files, text files, metrics and statistics."""
