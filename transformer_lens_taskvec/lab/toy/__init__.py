"""The toy model: a small language model of bitwise tasks that ships with the package."""
