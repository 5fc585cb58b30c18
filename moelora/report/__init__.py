"""Seeing the routing: figures first, as plain data; pages and pictures only draw them.

`job.routing_report` is the whole of it. Text (`passages`), what the model has (`routers`), running
sums (`data`), pure functions (`statistics`), the data itself (`results`), and how it is shown
(`page`, `markup`, `charts`, `figures`, `palette`) know one another only in that direction.
"""

from moelora.report.job import routing_report
from moelora.report.results import RoutingReport
from moelora.report.writing import write_report

__all__ = ["RoutingReport", "routing_report", "write_report"]
