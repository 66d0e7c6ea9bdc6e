"""General helpers that know nothing of quantization."""
