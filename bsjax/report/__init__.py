"""The report: claims and figures on one self-contained page, with the machine-readable files beside it."""

from bsjax.report.page import render_report as render_report
from bsjax.report.page import write_report as write_report
