"""The report of a run: ``report.json`` is the source of all its texts."""
