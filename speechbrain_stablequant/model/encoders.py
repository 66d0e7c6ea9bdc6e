"""Finds wav2vec 2.0 and HuBERT encoders, and knows their units and frames."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from .layer import HEAD, Cut


@dataclass(frozen=True)
class Encoder:
    """A HuggingFace wav2vec 2.0 or HuBERT model inside a Brain's module."""

    key: str  # of the Brain's module that holds it
    path: str  # of the model in the Brain's modules
    wrapper: nn.Module = field(repr=False)  # the Brain's module
    model: nn.Module = field(repr=False)  # Wav2Vec2Model or HubertModel

    def unit_of(self, name: str) -> str | None:
        """Unit of a layer, from its name in the Brain's modules."""
        if not name.startswith(self.path + "."):
            return None
        parts = name[len(self.path) + 1 :].split(".")
        if parts[0] == "feature_extractor":
            return f"conv.{parts[2]}"
        if parts[0] == "feature_projection":
            return "projection"
        if parts[:2] == ["encoder", "pos_conv_embed"]:
            return "pos_conv"
        if parts[:2] == ["encoder", "layers"]:
            return f"block.{parts[2]}"
        return ".".join(parts[:2])

    def cuts(self) -> list[Cut]:
        """Places from which a forward pass can be replayed, in order."""
        if getattr(self.wrapper, "output_all_hiddens", False):
            return [Cut(HEAD, self.wrapper)]
        extractor = self.model.feature_extractor
        projection, encoder = self.model.feature_projection, self.model.encoder
        convs, blocks = list(extractor.conv_layers), list(encoder.layers)
        before = (extractor, projection, encoder.pos_conv_embed)
        found = [
            Cut(f"conv.{i + 1}", conv, tuple(convs[:i]))
            for i, conv in enumerate(convs[:-1])
        ]
        found.append(Cut("projection", extractor))
        found.append(Cut("pos_conv", projection, (extractor,)))
        found.append(Cut("block.0", encoder.dropout, before))
        found += [
            Cut(f"block.{i + 1}", block, (*before, *blocks[:i]))
            for i, block in enumerate(blocks[:-1])
        ]
        return [*found, Cut(HEAD, self.wrapper)]

    def conv_geometry(self) -> list[tuple[int, int]]:
        return [
            (layer.conv.kernel_size[0], layer.conv.stride[0])
            for layer in self.model.feature_extractor.conv_layers
        ]

    def frames(self, samples: int) -> int:
        """Number of frames that the encoder produces."""
        return conv_frames(samples, self.conv_geometry())


def conv_frames(samples: int, geometry: Iterable[tuple[int, int]]) -> int:
    """Number of frames behind convolutions of these kernels and strides."""
    for kernel, stride in geometry:
        samples = max((samples - kernel) // stride + 1, 0)
    return samples


def conv_samples(frames: int, geometry: Sequence[tuple[int, int]]) -> int:
    """Number of samples that give so many frames."""
    for kernel, stride in reversed(geometry):
        frames = (frames - 1) * stride + kernel
    return frames


def find_encoders(modules: Mapping[str, nn.Module]) -> list[Encoder]:
    """Finds wav2vec 2.0 and HuBERT models, each once, under its first key."""
    encoders: dict[int, Encoder] = {}
    for key, module in modules.items():
        for path, child in module.named_modules(prefix=key):
            extractor = getattr(child, "feature_extractor", None)
            encoder = getattr(child, "encoder", None)
            if (
                hasattr(extractor, "conv_layers")
                and hasattr(child, "feature_projection")
                and hasattr(encoder, "pos_conv_embed")
                and hasattr(encoder, "layers")
            ):
                found = Encoder(key, path, module, child)
                encoders.setdefault(id(child), found)
                break
    return list(encoders.values())


def min_samples(modules: Mapping[str, nn.Module]) -> int:
    """Samples that give one frame of the first encoder; 1 without one."""
    for encoder in find_encoders(modules):
        return conv_samples(1, encoder.conv_geometry())
    return 1
