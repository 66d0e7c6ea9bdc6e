"""``EncoderASR`` on a quantized folder: the names that folders refer to.

A folder's ``hyperparams.yaml`` names them: ``QuantizedRecogniser`` and
``FolderLoader`` for an encoder with a CTC head, ``ModulesLoader`` for any
other recognizer. All of them must stay importable.
"""

import pydoc
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.decoders.ctc import CTCBeamSearcher
from speechbrain.utils.fetching import (
    FetchConfig,
    FetchFrom,
    LocalStrategy,
    fetch,
    guess_source,
)
from torch import nn

from .folder.live_modules import LiveModules
from .folder.recognizer import QuantizedRecognizer
from .folder.tokenizer_file import read_tokenizer
from .folder.weights_file import WEIGHTS_FILE, load_checkpoint, signed_files

QuantizedRecogniser = QuantizedRecognizer


class _Loader:
    """Finds a quantized folder.

    SpeechBrain's ``Pretrainer`` looks for ``.ckpt`` files and trusts what an
    earlier call left in ``savedir``. This one takes the folder's own files,
    wherever the folder is.
    """

    savedir: str | Path | None = None
    folder: Path | None = None

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


class FolderLoader(_Loader):
    """The ``pretrainer`` of a quantized encoder with a CTC head.

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

    def load_collected(self) -> None:
        """Reads the model and the tokenizer."""
        self.recogniser.load(self.folder, needs=[self.tokenizer_file])
        path = self.folder / self.tokenizer_file
        read_tokenizer(self.tokenizer, path)


class ModulesLoader(_Loader):
    """The ``pretrainer`` of any other quantized recognizer.

    It fills the modules of the YAML and makes their quantized layers compute
    with a runtime, so that whatever refers to them works unchanged. Threads,
    copies and forks: as for :class:`QuantizedRecogniser`.

    Arguments
    ---------
    checksum : str or None
        Of the ``model.safetensors`` that the YAML was written with.
    modules : dict
        The modules by the name that the file gives them; a list is a module
        and the path of one inside it.
    encoder : list of torch.nn.Module
        What computes the encoder's output, which the probe compares.
    tokenizer : object, optional
        To be loaded.
    tokenizer_file : str, optional
        Its file in the folder.
    late : list of LateModule
        Modules to be made from the folder's files first.
    backend : str
        The runtime, as for :class:`QuantizedRecogniser`.
    options : dict, optional
        Of the runtime, such as its number of threads.
    """

    def __init__(
        self,
        checksum: str | None,
        modules: Mapping[str, Any],
        encoder: Sequence[nn.Module],
        tokenizer: Any = None,
        tokenizer_file: str | None = None,
        late: Sequence["LateModule"] = (),
        backend: str = "auto",
        options: Mapping[str, Any] | None = None,
    ):
        self.checksum = checksum
        self.modules = modules
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.tokenizer_file = tokenizer_file
        self.late = late
        self.backend = backend
        self.options = options or {}
        #: What computes, from :meth:`load_collected` on.
        self.live: LiveModules | None = None

    def load_collected(self) -> None:
        """Reads the modules and the tokenizer."""
        needs = [] if self.tokenizer_file is None else [self.tokenizer_file]
        read = partial(load_checkpoint, self.folder, needs, self.checksum)
        checkpoint = read()
        for module in self.late:
            module.build(self.folder)
        live = LiveModules(
            self.named_modules(), self.encoder, self.backend, self.options
        )
        live.load(checkpoint, read, self.folder / WEIGHTS_FILE)
        if self.tokenizer_file is not None:
            path = self.folder / self.tokenizer_file
            read_tokenizer(self.tokenizer, path)
        self.live = live

    def named_modules(self) -> dict[str, nn.Module]:
        """The modules by the name that the file gives them."""
        named = {}
        for name, value in self.modules.items():
            path = ""
            if isinstance(value, list | tuple):
                value, path = value
            named[name] = value.get_submodule(path)
        return named


class EncoderChain(nn.Module):
    """Modules in a row, each called as a recipe calls it.

    SpeechBrain's ``LengthsCapableSequential`` knows some names of arguments for
    lengths, and no methods.

    Arguments
    ---------
    modules : dict
        Modules by name.
    calls : list of dict
        ``module``; ``method``, if not ``forward``; ``args`` and ``settings``,
        in which ``input`` is the previous output and ``lengths`` the relative
        lengths; ``output``, the place of the output among several.

    Example
    -------
    >>> double = EncoderChain(
    ...     {"twice": torch.nn.Upsample(scale_factor=2)},
    ...     [{"module": "twice", "args": ["input"]}],
    ... )
    >>> double(torch.ones(1, 2, 3), torch.ones(1)).shape
    torch.Size([1, 2, 6])
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        calls: Sequence[Mapping[str, Any]],
    ):
        super().__init__()
        self.steps = nn.ModuleDict(modules)
        self.calls = calls

    def forward(
        self, wavs: torch.Tensor, wav_lens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encodes [batch, samples]; ``wav_lens`` are relative."""
        x = wavs
        for call in self.calls:

            def given(value: Any, x: torch.Tensor = x) -> Any:
                named = {"input": x, "lengths": wav_lens}
                return named[value] if isinstance(value, str) else value

            run = self.steps[call["module"]]
            if "method" in call:
                run = getattr(run, call["method"])
            settings = call.get("settings", {})
            x = run(
                *map(given, call.get("args", ())),
                **{name: given(value) for name, value in settings.items()},
            )
            if not isinstance(x, torch.Tensor):
                x = x[call.get("output", 0)]
        return x


class MarkedBeamSearcher(CTCBeamSearcher):
    """A beam search over labels such as BERT's, of which some mark the
    begin and end of a text: ``markers``, which its texts are without."""

    def __init__(self, *args: Any, markers: Sequence[str] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.markers = markers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns hypotheses as ``CTCBeamSearcher`` does."""
        found = super().__call__(*args, **kwargs)
        for hypothesis in (x for row in found for x in row):
            for marker in self.markers:
                hypothesis.text = hypothesis.text.replace(marker, "")
        return found


class LabelTokenizer(CTCTextEncoder):
    """Labels as the tokenizer of ``EncoderDecoderASR``."""

    def decode_ids(self, ids: Sequence[int]) -> str:
        """The text of labels: characters, or phonemes with spaces between."""
        labels = self.decode_ndim(list(ids))
        letters = all(len(str(label)) < 2 for label in self.lab2ind)
        return ("" if letters else " ").join(labels)


class LateModule(nn.Module):
    """A module that is made when the folder's files are there.

    Arguments
    ---------
    kind : str
        The class that it becomes. One of SpeechBrain's HuggingFace wrappers
        gets its configuration and its tokenizer from the folder, and no
        weights.
    settings, args : dict, list
        Arguments of the class.
    """

    def __init__(
        self,
        kind: str,
        settings: Mapping[str, Any] | None = None,
        args: Sequence[Any] = (),
    ):
        super().__init__()
        # Modules among them are no children yet.
        vars(self)["_late"] = kind, args, dict(settings or {})

    def build(self, folder: Path) -> None:
        """Becomes the module."""
        from speechbrain.integrations.huggingface.huggingface import (
            HFTransformersInterface,
        )

        name, args, settings = self._late
        kind = pydoc.locate(name)
        if issubclass(kind, HFTransformersInterface):
            kind = type(kind.__name__, (_NoWeights, kind), {})
            settings |= {"source": str(folder), "save_path": str(folder)}
        del self._late
        self.__class__ = kind
        self.__init__(*args, **settings)


class _NoWeights:
    """A HuggingFace wrapper whose weights come later."""

    def _from_pretrained(self, source: str, **_: Any) -> None:
        self.model = self.auto_class.from_config(self.config)
