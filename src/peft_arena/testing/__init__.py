"""Public checks for tasks, methods and models that others add; needs pytest only where a function says so."""
