"""The report of a benchmark, `report.html`: `statistics` and `verdict` compute, `figures` draws, `page` puts all of it together."""

from .page import DRAWN, FIGURES, PAGE, write_report

__all__ = ["DRAWN", "FIGURES", "PAGE", "write_report"]
