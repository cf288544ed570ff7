"""The report of a benchmark: `statistics` and `verdict` compute, `figures` draws, `page` puts all of it together; `table` is for the
console.
"""
