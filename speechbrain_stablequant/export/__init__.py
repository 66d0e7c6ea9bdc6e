"""Quantized folders for other engines."""

from .engines import ENGINES, export_for
from .onnx_file import export_folder

__all__ = ["ENGINES", "export_folder", "export_for"]
