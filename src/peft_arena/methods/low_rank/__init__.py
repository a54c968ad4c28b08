"""Methods whose change of a weight is a product of low-rank factors: LoRA and its kin."""
