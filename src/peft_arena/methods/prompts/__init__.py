"""Methods that train what stands before the input: tokens, keys and values."""
