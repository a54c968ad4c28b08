"""What other benchmarks run and found, read into our forms; and our records in theirs."""
