"""`yuanmoe quantize`: options, and what people are told."""
