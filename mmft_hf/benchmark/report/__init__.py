"""The report of a benchmark, `report.html`: `statistics` and `verdict` compute, `figures` draws, `page` puts all of it together."""

from .page import DRAWN, FIGURES, PAGE, check_packages, write_report

__all__ = ["DRAWN", "FIGURES", "PAGE", "check_packages", "write_report"]
