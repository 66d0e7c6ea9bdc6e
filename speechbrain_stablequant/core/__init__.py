"""What a quantized thing is: scales, weights, plans, integer layers."""
