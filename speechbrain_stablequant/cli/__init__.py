"""The ``stablequant`` command."""
