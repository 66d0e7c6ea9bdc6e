"""Methods that decide the integers, each layer behind the quantized ones."""
