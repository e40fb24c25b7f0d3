"""The report that a person looks at: one HTML page, a Markdown page and its pictures."""

from lorkd_monai.report.page import write_report

__all__ = ["write_report"]
