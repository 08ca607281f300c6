"""Files of weights, read a tensor or a part of one at a time, whatever is in them."""
