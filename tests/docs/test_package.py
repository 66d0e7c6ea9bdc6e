"""What the wheel and the source archive hold."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import speechbrain_stablequant

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "speechbrain_stablequant"
BUILD = (
    "from setuptools import build_meta as b; b.build_wheel({0!r});"
    " b.build_sdist({0!r})"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, made of a copy."""
    place = tmp_path_factory.mktemp("build")
    source, out = place / "source", place / "out"
    ignore = shutil.ignore_patterns(
        *("__pycache__", ".*", "*.egg-info", "build", "results", "recipes")
    )
    shutil.copytree(ROOT, source, ignore=ignore, symlinks=True)
    # The demo is left out of the copy but for one file: 5 MB.
    demo = source / "recipes" / "demo.flac"
    demo.parent.mkdir()
    demo.write_bytes(b"")
    out.mkdir()
    code = BUILD.format(str(out))
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return out


def files_of_package() -> set[str]:
    """What the package has in the checkout."""
    kinds = (".py", ".yaml", ".jinja")
    package = ROOT / PACKAGE
    # rglob() does not follow the link to hparams/.
    files = [*package.rglob("*"), *package.glob("hparams/*")]
    return {str(x.relative_to(ROOT)) for x in files if x.suffix in kinds}


def test_wheel(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        inside = {x for x in names if x.startswith(f"{PACKAGE}/")}
        assert inside == files_of_package()
        # Nothing else is installed: no tests, no demo.
        info = f"{PACKAGE}-{speechbrain_stablequant.__version__}.dist-info"
        assert all(x.startswith(info) for x in names - inside)
        assert f"{info}/licenses/LICENSE" in names
        metadata = message_from_string(
            archive.read(f"{info}/METADATA").decode("utf-8")
        )
        entry = archive.read(f"{info}/entry_points.txt").decode("utf-8")
    assert metadata["Version"] == speechbrain_stablequant.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "stablequant = speechbrain_stablequant.cli.app:main" in entry


def test_source_archive(built):
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {x.partition("/")[2] for x in archive.getnames()}
    assert files_of_package() <= names
    assert {"LICENSE", "CHANGELOG.md", "CITATION.cff", "setup.cfg"} <= names
    assert not [x for x in names if x.startswith(("recipes/", "tests/"))]
