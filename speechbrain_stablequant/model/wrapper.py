"""SpeechBrain's wrapper around a HuggingFace model that is already loaded."""

from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
from torch import nn

#: What SpeechBrain's wrapper knows beside its model.
WRAPPER_SETTINGS = ("normalize_wav", "output_norm", "output_all_hiddens")


class StoredEncoder(Wav2Vec2):
    """SpeechBrain's wrapper around a loaded encoder; it downloads nothing."""

    def __init__(
        self,
        model: nn.Module,
        normalize_wav: bool,
        output_norm: bool,
        output_all_hiddens: bool = False,
    ):
        # Not that of Wav2Vec2, which fetches a model.
        nn.Module.__init__(self)
        self.model = model
        self.freeze = True
        self.normalize_wav = normalize_wav
        self.output_norm = output_norm
        self.output_all_hiddens = output_all_hiddens
