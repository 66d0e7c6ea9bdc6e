"""Integers and biases of the layers of a session, solved layer by layer."""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ...utils import distributed
from ...utils.files import identity
from .prefix_walk import PrefixWalk
from .reconstruct import LayerStore, Solve, refine

if TYPE_CHECKING:
    from ...core.layer_quant import LayerQuant, LayerTensors
    from ...model.layers import Layer
    from ..session import Session

logger = logging.getLogger(__name__)

LAYER_FOLDER = "finished_layers"


def rounded_layers(
    session: "Session",
    weights: str,
    in_order: bool,
    quants: Mapping[str, "LayerQuant"],
    what: str,
    solve: Callable[["Layer"], Solve | None],
    corrects_bias: Callable[["Layer"], bool] = lambda _: False,
) -> dict[str, "LayerTensors"]:
    """Decides integers and biases layer by layer, cached on disk.

    ``weights``: fingerprint of the float model; ``in_order``: whether layers
    are called in the order of their units; ``quants``: other layers stay float;
    ``what``: name of the method. ``solve`` gives a layer's solver, None for the
    nearest integers; ``corrects_bias`` says whether its bias compensates the
    mean error of its output.
    """
    content = [
        "means of what is in the range",
        weights,
        session.recognizer.key("calibration", "inputs"),
        {name: quant.to_dict() for name, quant in quants.items()},
        [
            [layer.name, repr(solve(layer)), corrects_bias(layer)]
            for layer in session.layers
            if layer.name in quants
        ],
    ]
    store = LayerStore(session.store.below(LAYER_FOLDER), identity(content))
    # The session's own simulator: weights fake-quantized here are reused
    # when the result is measured.
    session.simulator.tensors = {}
    walk = PrefixWalk(session, in_order)
    with session.bar(len(quants), what) as bar:

        def on_layer(name: str) -> None:
            bar.update(1)
            bar.set_postfix_str(name.rpartition(".")[2])

        found = refine(walk, quants, store, solve, corrects_bias, on_layer)
    missing = sorted(quants.keys() - found.keys())
    if missing:
        raise ValueError(
            f"{missing[0]}: was not called in the first batch; add it to "
            "quantize.exclude"
        )
    if store.reused:
        logger.info("%s: %d layers from disk", what, store.reused)
    if distributed.size() > 1:
        # Another GPU may round differently: all take the first one's.
        found = {name: tensors.cpu() for name, tensors in found.items()}
    return distributed.from_main(found)
