"""Integers on a CPU with torch alone, by its oneDNN operators; any length."""

from .executor import TorchInt8Executor, make_executor
from .layer import make_layer

__all__ = ["TorchInt8Executor", "make_executor", "make_layer"]
