"""All that touches ``sb.Brain``: from ``brain.evaluate`` to the report."""
