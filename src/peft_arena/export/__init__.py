"""Tuned points in the forms that other programs read: plain adapters, LoRA, whole models, GGUF."""
