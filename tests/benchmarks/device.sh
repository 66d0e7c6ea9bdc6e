#!/bin/bash
# The first fifteen minutes on a GPU, in two calls of at most 280 s each:
#   bash tests/benchmarks/device.sh first CARRY OUT     # is it right, how fast
#   bash tests/benchmarks/device.sh second CARRY OUT    # error rates, rivals
# CARRY has what is not in this tree; each part that is missing is skipped:
#   wheels/     SpeechBrain and what it needs, installed without a network
#   folder/     an inference folder at W8A8
#   test/       a split in LibriSpeech's layout
# OUT gets one file for each step as soon as it ends, steps.jsonl and table.md.
cd "$(dirname "$0")/../.." || exit 1
export HF_HUB_OFFLINE=1 TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/triton}"
export PYTHONPATH="$PWD:$2/site"
if [ -d "$2/wheels" ] && [ ! -d "$2/site" ]; then
    python -m pip install -q --no-index --no-deps --target "$2/site" "$2"/wheels/*.whl
fi
exec python tests/benchmarks/device.py "$@"
