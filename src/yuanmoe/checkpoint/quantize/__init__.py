"""From any checkpoint to one in 4 or 8 bits, without ever holding it, and what that costs."""
