"""What several unit tests are made from."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

# Helpers of the tests, not modules with doctests.
collect_ignore = ["quantized_folder.py"]
