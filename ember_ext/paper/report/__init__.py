"""The report on a reproduction: one page, in HTML and in Markdown, and its numbers."""

from ember_ext.paper.report.report import ReportContext, write_report

__all__ = ["ReportContext", "write_report"]
