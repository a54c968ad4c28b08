"""Fine-tuning methods: a folder for each family, found by name through :mod:`peft_arena.methods.registry`."""
