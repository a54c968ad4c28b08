"""Frozen specs, the strict reader, ids, registries and errors. Imports nothing of ours and never torch."""
