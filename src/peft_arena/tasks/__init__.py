"""What models are trained and judged on: cards, items, prompts, scores; and the registry of all tasks."""
