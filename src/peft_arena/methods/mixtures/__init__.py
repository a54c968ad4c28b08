"""Methods that mix several low-rank adapters by a trained gate."""
