"""The model of a quantized folder in other formats, one module for each."""

from .onnx import export_folder

__all__ = ["export_folder"]
