"""torch and torchaudio that do not load together, in one line.

torchaudio is compiled against torch, and SpeechBrain always imports it. The
pairs below are registry builds that loaded on Linux.
"""

from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement
from packaging.version import Version


def matching_torchaudio(torch: str) -> str:
    """Returns the requirement for a torchaudio that loads with this torch."""
    release = Version(torch)
    if release.release[:2] < (2, 11):
        return f"torchaudio=={release.base_version}"
    if release.release[:2] < (2, 13):
        return "torchaudio==2.11.0"
    return "torchaudio>=2.11.1"


def pair_error(torch: str, torchaudio: str | None, reason: str) -> str:
    """Returns one line with the command that installs a matching pair."""
    wanted = matching_torchaudio(torch)
    if torchaudio is None:
        return f'torch {torch} needs a torchaudio: pip install "{wanted}"'
    pair = f"torch {torch} and torchaudio {torchaudio} do not load together"
    specifier = Requirement(wanted).specifier
    if not specifier.contains(torchaudio, prereleases=True):
        return f'{pair}: pip install "{wanted}"'
    return (
        f"{pair} ({reason}): take both from one index: pip install --upgrade"
        " --force-reinstall torch torchaudio"
    )


def import_torchaudio() -> None:
    """Imports torchaudio, or raises ImportError in one line."""
    # Import torch first, so that its own errors are not blamed on torchaudio.
    import_module("torch")
    try:
        import_module("torchaudio")
    except (ImportError, OSError, RuntimeError) as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        found = None
        with suppress(PackageNotFoundError):
            found = version("torchaudio")
        reason = " ".join(str(first).split()).rstrip(".")
        raise ImportError(pair_error(version("torch"), found, reason)) from None
