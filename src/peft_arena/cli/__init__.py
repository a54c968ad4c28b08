"""The command line: arguments in, one function called, its result printed. Nothing else in the package prints."""
