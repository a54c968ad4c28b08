"""From records to statements: paired differences, gain, retention, comparisons, Pareto front. Never torch."""
