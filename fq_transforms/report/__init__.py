"""What quantization does to each expert: a table and plots."""
