"""Study files: their form, what a study stands for, and what is refused or told before any work."""
