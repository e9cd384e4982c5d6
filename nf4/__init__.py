"""The NF4 number format in plain torch: levels, blocks, double-quantized scales, one record."""
