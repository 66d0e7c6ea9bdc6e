"""A plan that the block names, instead of a search."""

import logging

from ..core.plan import QuantizationPlan
from .session import Session

logger = logging.getLogger(__name__)


def given_plan(session: Session, weights: str) -> QuantizationPlan:
    """Reads ``plan:`` of the block.

    Raises a ValueError for another model, and warns of other weights.
    """
    plan = QuantizationPlan.load(session.config.plan)
    plan.check_fits(
        session.layers, session.recognizer.modules, session.config.plan
    )
    if plan.fingerprint != weights:
        logger.warning(
            "quantize.plan: %s was made for other weights of the same "
            "architecture; its scales may not fit",
            session.config.plan,
        )
    return plan
