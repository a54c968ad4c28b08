"""Commands for those who work on peft-arena itself: they keep its records and write the numbers of its docs."""
