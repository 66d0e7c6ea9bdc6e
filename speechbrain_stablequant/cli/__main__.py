"""``python -m speechbrain_stablequant.cli``, as the ``stablequant`` command."""

from .app import main

main()
