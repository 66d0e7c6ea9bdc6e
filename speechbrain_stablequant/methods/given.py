"""A plan that the block names, instead of a search."""

import logging

from ..core.plan import QuantizationPlan
from .session import Stage

logger = logging.getLogger(__name__)


def given_plan(stage: Stage, weights: str) -> QuantizationPlan:
    """Reads ``plan:`` of the block.

    Raises a ValueError for another model, and warns of other weights.
    """
    plan = QuantizationPlan.load(stage.config.plan)
    kinds = {layer.name: layer.kind for layer in stage.layers}
    plan.check_matches(kinds, stage.config.plan)
    plan.check_tensors(
        stage.layers, stage.recognizer.modules, stage.config.plan
    )
    if plan.fingerprint != weights:
        logger.warning(
            "quantize.plan: %s was made for other weights of the same "
            "architecture; its scales may not fit",
            stage.config.plan,
        )
    return plan
