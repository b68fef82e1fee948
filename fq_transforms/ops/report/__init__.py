"""What quantization does to each expert, in numbers."""
