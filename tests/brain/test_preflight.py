"""What is said of a recipe before it is run."""

from pathlib import Path

import pytest

from speechbrain_stablequant.brain import preflight
from speechbrain_stablequant.brain.block import read_block
from speechbrain_stablequant.brain.preflight import check_recipe
from speechbrain_stablequant.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*/*/hparams/*.yaml"))
# Its model cannot be made, so none of it is.
RECIPE = """
hub: {hub}
folder: results
model: !new:package.that.is.not.There
    width: 3
wav2vec2: !new:speechbrain.integrations.huggingface.wav2vec2.Wav2Vec2
    source: !ref <hub>
    save_path: !ref <folder>/save
head: !apply:transformers.AutoModelForCTC.from_pretrained
    pretrained_model_name_or_path: {named}
quantize: !apply:speechbrain_stablequant.register
    target: [wav2vec2]
    output_folder: !ref <folder>/quantized
    {key}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes the YAML; returns the start of a command line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()

    def write(key="seed: 1", hub="there", named="some/model") -> list[str]:
        text = RECIPE.format(key=key, hub=hub, named=named)
        Path("recipe.yaml").write_text(text)
        return ["recipe.yaml"]

    return write


def test_a_key_of_the_yaml_and_of_the_command_line(recipe):
    check_recipe(recipe())
    with pytest.raises(ConfigError, match=r"^quantize.sed: unknown key; did y"):
        check_recipe(recipe("sed: 1"))
    options = ["--device", "cpu", "--quantize", "{search: {treshold: 1}}"]
    with pytest.raises(ConfigError, match=r"^quantize.search.treshold: unkno"):
        check_recipe([*recipe(), *options])
    check_recipe([*recipe(), "--quantize", "null"])


@pytest.mark.parametrize("place", ["hub", "named"])
def test_a_checkpoint_that_is_not_there(recipe, place):
    key = "hub" if place == "hub" else "head.pretrained_model_name_or_path"
    with pytest.raises(ValueError) as error:
        check_recipe(recipe(**{place: "/nowhere/at/all"}))
    assert str(error.value) == (
        f"recipe.yaml: {key}: /nowhere/at/all is neither a folder nor an id of "
        "the HuggingFace Hub; correct it"
    )
    with pytest.raises(ValueError, match=r"^recipe.yaml: hub: a/b/c is neith"):
        check_recipe([*recipe(), "--hub", "a/b/c"])
    check_recipe(recipe(**{place: str(Path("there").resolve())}))


def test_what_only_the_recipe_can_say(recipe, capsys):
    """Files, options and tags that it reads in a way of its own."""
    check_recipe(["missing.yaml"])
    check_recipe([*recipe("seed: !ref <model>")])
    check_recipe([*recipe(), "--seed"])
    check_recipe([*recipe("sed: !PLACEHOLDER")])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("path", RECIPES, ids=lambda x: x.name)
def test_the_recipes_pass(path, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    read = []

    def noted(block):
        read.append(read_block(block))

    monkeypatch.setattr(preflight, "read_block", noted)
    check_recipe([str(path), "--data_folder", "."])
    assert len(read) == path.read_text("utf-8").count("stablequant.register")
