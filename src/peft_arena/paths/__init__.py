"""Rules that turn one factor into a factor for each layer, the strengths they go by, and a model that is moved."""
