"""What the commands do besides running studies: each takes points or files by name and gives a result."""
