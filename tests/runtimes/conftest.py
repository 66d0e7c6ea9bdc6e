"""Tests of runtimes compute in two threads, as users do."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _two_threads():
    """Tests side by side start with one thread each, which hides races."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
