"""Compare fine-tuning methods: what each gains, what it forgets and what it costs, with evidence."""

__version__ = "0.1.0"
