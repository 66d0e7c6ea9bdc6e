"""``EncoderASR`` on a quantized folder: the names that folders refer to.

A folder's ``hyperparams.yaml`` names ``QuantizedRecogniser`` and
``FolderLoader``. Both names must stay importable.
"""

from pathlib import Path
from typing import Any

from speechbrain.utils.fetching import (
    FetchConfig,
    FetchFrom,
    LocalStrategy,
    fetch,
    guess_source,
)

from .folder.recognizer import QuantizedRecognizer
from .folder.tokenizer_file import read_tokenizer
from .folder.weights_file import WEIGHTS_FILE, signed_files

QuantizedRecogniser = QuantizedRecognizer


class FolderLoader:
    """The ``pretrainer`` of a quantized folder.

    SpeechBrain's own looks for ``.ckpt`` files and trusts what an earlier
    call left in ``savedir``. This one reads the folder's own files, wherever
    the folder is.

    Arguments
    ---------
    recogniser : QuantizedRecognizer
        To be loaded.
    tokenizer : CTCTextEncoder or SentencePieceProcessor
        To be loaded.
    tokenizer_file : str
        Its file in the folder.
    """

    def __init__(
        self,
        recogniser: QuantizedRecognizer,
        tokenizer: Any,
        tokenizer_file: str,
    ):
        self.recogniser = recogniser
        self.tokenizer = tokenizer
        self.tokenizer_file = tokenizer_file
        self.savedir: str | Path | None = None
        self.folder: Path | None = None

    def set_collect_in(self, path: str | Path | None) -> None:
        """Sets where files of a web address are stored."""
        self.savedir = path

    def collect_files(
        self,
        default_source: Any = None,
        local_strategy: LocalStrategy = LocalStrategy.NO_LINK,
        fetch_config: FetchConfig | None = None,
    ) -> None:
        """Finds the folder, or fetches its files; arguments as of
        ``from_hparams``."""
        kind, source = guess_source(default_source)
        if kind == FetchFrom.LOCAL:
            self.folder = Path(source).absolute()
            return

        def get(name: str) -> Path:
            return fetch(
                name,
                default_source,
                # A web address has no cache of its own, the hub has.
                savedir=self.savedir if kind == FetchFrom.URI else None,
                local_strategy=LocalStrategy.NO_LINK,
                fetch_config=fetch_config or FetchConfig(),
            )

        path = Path(get(WEIGHTS_FILE))
        for name in signed_files(path):
            get(name)
        self.folder = path.parent

    def load_collected(self) -> None:
        """Reads the model and the tokenizer."""
        self.recogniser.load(self.folder, needs=[self.tokenizer_file])
        path = self.folder / self.tokenizer_file
        read_tokenizer(self.tokenizer, path)
