"""The inference folder: written, read, checked."""
