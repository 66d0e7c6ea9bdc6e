"""ONNX Runtime (extra ``onnx``)."""
