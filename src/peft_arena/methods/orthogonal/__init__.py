"""Methods that rotate or mirror what a weight reads or writes."""
