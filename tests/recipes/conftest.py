"""The recipe's scripts as a user starts them."""

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from starter import Finished

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "LibriSpeech" / "ASR" / "CTC"


@pytest.fixture(scope="session")
def run(starter) -> Callable[..., Finished]:
    """Runs a script of a recipe on one core, with an output folder and more
    of the command line."""

    def start(
        output: Path,
        *options: object,
        script: str = "train.py",
        hparams: str = "hparams/quant.yaml",
        recipe: Path = RECIPE,
        **variables: str,
    ) -> Finished:
        command = [script, hparams, "--output_folder", output]
        command += ["--device", "cpu", *options]
        return starter.run(*command, cwd=recipe, **variables)

    return start


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """One speaker of each split of the demo."""
    folder = tmp_path_factory.mktemp("few")
    for split in ("dev-demo", "test-demo"):
        source = RECIPE / "demo" / "LibriSpeech" / split
        speaker = sorted(source.iterdir())[0]
        shutil.copytree(speaker, folder / split / speaker.name)
    return folder


@pytest.fixture(scope="module")
def script() -> Callable:
    """Imports a script of the recipe by name, as another script does it."""

    def load(name: str) -> ModuleType:
        for known in ("train", name):
            sys.modules.pop(known, None)
        return importlib.import_module(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPE))
        yield load
