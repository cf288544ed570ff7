"""Several methods under one protocol: the same images, seeds and selection for all, and a test split that none can read.

`protocol` says what a cell (method, shots, seed) is given, `methods` what is done with it, `grid` runs the cells and keeps
each result, `table` puts them together for the console, `report` for a page with figures.
"""
