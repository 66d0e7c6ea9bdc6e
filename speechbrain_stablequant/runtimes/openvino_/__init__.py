"""OpenVINO on a CPU: the fastest integers there (extra ``cpu``)."""

from .executor import OpenVINOExecutor, make_executor

__all__ = ["OpenVINOExecutor", "make_executor"]
