"""A folder for each of several processes, with what an earlier run left."""

import atexit
import shutil
import tempfile
from pathlib import Path

from .. import distributed
from .rounding import LAYER_FOLDER


def own_copy(folder: Path) -> Path:
    """The folder itself for the first process, a copy for each other one.

    All of them remember and read the same, and one writes what stays. The
    first sends what it has, so that no disk has to be shared; models and
    reports are left out.

    Arguments
    ---------
    folder : Path
        The output folder.

    Returns
    -------
    Path
        Copies are deleted when their process ends.

    Example
    -------
    >>> own_copy(Path("results"))
    PosixPath('results')
    """
    if distributed.size() == 1:
        return folder
    kept: dict[str, bytes] = {}
    if distributed.is_main():
        files = [*folder.glob("*.json*"), *(folder / LAYER_FOLDER).glob("*")]
        kept = {str(f.relative_to(folder)): f.read_bytes() for f in files}
    kept = distributed.from_main(kept)
    if distributed.is_main():
        return folder
    own = Path(tempfile.mkdtemp(prefix="quantize_"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    for name, content in kept.items():
        path = own / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return own
