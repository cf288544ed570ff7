"""One module per verb of the command line: `ARGUMENTS` are its dataclasses, `run` does the work."""
