"""The activations of the MLP by name; learning/models/activations.py has their functions, which need torch."""

from __future__ import annotations

from typing import Literal, get_args

ActivationName = Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu"]
ACTIVATIONS: tuple[str, ...] = get_args(ActivationName)
GATED = {"swiglu": "silu", "geglu": "gelu_tanh"}
"""Activations with a gate (Shazeer 2020): a third matrix, whose output goes through this function of
learning/models/activations.py."""
