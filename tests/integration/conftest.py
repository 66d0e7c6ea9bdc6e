"""A recipe that was trained once, for all tests that need one."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "recipe_without_mention")]

from starter import Finished  # noqa: E402
from trained_recipe import RECIPE, Trained  # noqa: E402

# Scripts of the tests, not modules with doctests.
collect_ignore = [
    "attach.py",
    "decoding_recipe.py",
    "distributed_recipe.py",
    "faulty_recipe.py",
    "forks.py",
    "slow_recipe.py",
    "recipe_without_mention/material.py",
    "recipe_without_mention/train.py",
]


@pytest.fixture(scope="session")
def trained(starter, tmp_path_factory) -> Trained:
    """The recipe without mention, trained without a block."""
    from material import make_corpus, make_encoder

    root = tmp_path_factory.mktemp("recipe")
    make_encoder(root / "encoder")
    make_corpus(root / "corpus")
    empty = Trained(starter, root, Finished(0, "", ""))
    arguments = empty.arguments(empty.output, block="")
    finished = starter.run(RECIPE / "train.py", *arguments, cwd=root)
    assert finished.code == 0, finished.err
    return Trained(starter, root, finished)
