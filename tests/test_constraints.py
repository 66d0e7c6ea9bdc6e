"""The versions that were tested are versions that setup.cfg allows."""

from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FILES = ("lowest", "capped", "newest")


def requirements(text: str) -> dict[str, Requirement]:
    """Those of a file's lines by name."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    found = map(Requirement, filter(None, lines))
    return {canonicalize_name(x.name): x for x in found}


@pytest.fixture(scope="module")
def allowed() -> dict[str, Requirement]:
    """What setup.cfg asks for, with the extras that the tests need."""
    setup = ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    return requirements(
        setup["options"]["install_requires"] + "\n" + extras["test"]
    )


@pytest.mark.parametrize("name", FILES)
def test_pins_are_within_the_ranges(name, allowed):
    pins = requirements((ROOT / f"tests/constraints/{name}.txt").read_text())
    # Tools of the tests alone need no lowest version.
    assert set(allowed) - set(pins) <= {"ruff", "hypothesis", "setuptools"}
    for package in set(pins) & set(allowed):
        (pin,) = pins[package].specifier
        assert pin.operator == "=="
        assert pin.version in allowed[package].specifier, package


def test_lowest_are_the_lower_bounds(allowed):
    pins = requirements((ROOT / "tests/constraints/lowest.txt").read_text())
    for package in set(pins) & set(allowed):
        (pin,) = pins[package].specifier
        bounds = [x for x in allowed[package].specifier if x.operator == ">="]
        (bound,) = bounds
        assert Version(pin.version) == Version(bound.version), package
