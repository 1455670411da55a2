"""ROOTS: train language models with explicit parallelism that proves itself."""

__version__ = "0.1.0"
