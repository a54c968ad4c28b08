"""Fine-tuning methods: one file per family, found by name through :mod:`peft_arena.methods.registry`."""
