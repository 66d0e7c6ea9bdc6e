"""Ends with an error if a quantized WER is far from that of the float model.

> python check_wer.py results/quant/1986/quantized/report.json
"""

import json
import sys
from pathlib import Path

#: Points of WER.
TOLERANCE = 0.5

if __name__ == "__main__":
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name, pair in report["test"].items():
        reference, found = pair["float"]["WER"], pair["quantized"]["WER"]
        line = (
            f"{name}: WER {reference:.2f} float, {found:.2f} on"
            f" {report['backend']} ({report['environment']['cpu class']})"
        )
        print(line)
        if abs(found - reference) > TOLERANCE:
            sys.exit(f"{line}: more than {TOLERANCE} points apart")
    if not report["test"]:
        sys.exit(f"{sys.argv[1]}: holds no test set")
