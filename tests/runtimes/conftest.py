"""Tests of runtimes compute in two threads, as users do."""

import sys
from pathlib import Path

import pytest
import torch

# What several test files import.
sys.path[:0] = [str(Path(__file__).resolve().parent)]


@pytest.fixture(autouse=True)
def _two_threads():
    """Tests side by side start with one thread each, which hides races."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
