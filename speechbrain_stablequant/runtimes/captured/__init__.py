"""Modules of any recognizer as graphs of OpenVINO."""
