"""``stablequant_plus``: beyond the paper, without training."""
