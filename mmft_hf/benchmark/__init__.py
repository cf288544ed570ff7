"""Compares methods under one protocol: the same images, seeds and selection for all, and a test split that none can read.

`run.methods` is the table of methods, `run.protocol` says what each of them is given, `run.workflow` runs a grid of them, and
`report` writes a page about the results.
"""
