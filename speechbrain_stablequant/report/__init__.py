"""The report of a quantization run.

``report.json`` is the only source of the Markdown, the HTML and the plots.
"""
