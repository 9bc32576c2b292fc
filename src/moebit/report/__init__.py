"""What happened, as pages for people: one output's report, and several outputs side by side."""

from moebit.report.compare import compare
from moebit.report.page import report

__all__ = ["compare", "report"]
