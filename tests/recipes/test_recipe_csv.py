"""The recipes' table in SpeechBrain's form: its own tools can run it.

Rows without debug flags need LibriSpeech or a download.
"""

import csv
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
with open(ROOT / "tests/recipes/LibriSpeech.csv", encoding="utf-8") as table:
    ROWS = list(csv.DictReader(table))
FILES = ("Script_file", "Hparam_file", "Data_prep_file", "Readme_file")


def test_each_yaml_has_a_row_and_each_file_is_there():
    files = (ROOT / "recipes").glob("**/hparams/*.yaml")
    found = sorted(str(file.relative_to(ROOT)) for file in files)
    assert found == sorted(row["Hparam_file"] for row in ROWS)
    for row in ROWS:
        assert not [
            row[key] for key in FILES if not (ROOT / row[key]).is_file()
        ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if row["test_debug_flags"]],
    ids=lambda row: row["Hparam_file"],
)
def test_debug_flags(row, run, few, tmp_path):
    output = tmp_path / "out"
    done = run(
        output,
        *("--data_folder", few),
        *shlex.split(row["test_debug_flags"]),
        script=Path(row["Script_file"]).name,
        hparams=ROOT / row["Hparam_file"],
        recipe=(ROOT / row["Script_file"]).parent,
    )
    assert done.code == 0, done.err
    (names,) = re.findall(r"file_exists=\[(.+?)\]", row["test_debug_checks"])
    assert not [x for x in names.split(",") if not (output / x).is_file()]
