"""Runtimes: what executes a plan."""
