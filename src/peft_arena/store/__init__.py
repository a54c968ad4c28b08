"""Append-only records with a schema version, checkpoints that are whole or absent, tidy tables. Never torch."""
