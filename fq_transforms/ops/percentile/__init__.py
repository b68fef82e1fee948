"""The percentile of the magnitudes in each granule."""
