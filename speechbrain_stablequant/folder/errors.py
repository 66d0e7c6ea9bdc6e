"""The error about a folder on disk."""


class CheckpointError(ValueError):
    """A quantized model on disk is damaged, mixed up or something else."""
