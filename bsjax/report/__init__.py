"""The report: claims and figures on one self-contained page, with the machine-readable files beside it."""

from bsjax.report.batch_size import render_report as render_report
from bsjax.report.batch_size import write_report as write_report
from bsjax.report.coverage import coverage_page as coverage_page
from bsjax.report.experiment import Page as Page
from bsjax.report.experiment import Table as Table
from bsjax.report.experiment import render_experiment as render_experiment
from bsjax.report.experiment import write_experiment as write_experiment
from bsjax.report.large_batch import large_batch_page as large_batch_page
from bsjax.report.noise import noise_page as noise_page
from bsjax.report.pretrain import pretrain_page as pretrain_page
from bsjax.report.scaling import scaling_page as scaling_page
from bsjax.report.sharp import sharp_page as sharp_page
from bsjax.report.steps import steps_page as steps_page
