"""What is quantized: layers and units of a recognizer."""
