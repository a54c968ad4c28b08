"""What a run costs: parameters, bytes, operations, memory and time, each a measure that says how it was obtained."""
