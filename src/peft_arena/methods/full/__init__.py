"""Full fine-tuning, and the base model, which trains nothing."""
