"""What layers take as inputs: where a model multiplies them with a selected weight, their amax, their quantization."""
