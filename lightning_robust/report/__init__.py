"""Figures and tables for people: pure functions from numbers to pictures and files."""

from lightning_robust.report.accuracy_matrices import AccuracyMatrix, accuracy_matrices
from lightning_robust.report.atomic import atomic_file
from lightning_robust.report.audit import audit_figures, print_audit
from lightning_robust.report.contact_sheet import contact_sheet
from lightning_robust.report.curves import curve
from lightning_robust.report.detection import roc_curves, sensitivity_histograms
from lightning_robust.report.distillation import gradient_ranges, success_against_temperature, success_bars
from lightning_robust.report.examples import adversarial_examples
from lightning_robust.report.figures import save_figure, to_uint8_image
from lightning_robust.report.heatmaps import class_heatmaps, heatmap
from lightning_robust.report.lambda_sweep import lambda_curves, lambda_maps
from lightning_robust.report.one_pixel import class_pairs, classes_reached, pixel_examples
from lightning_robust.report.regions import REGION_COLOURS, blob_figure, region_examples, region_representatives
from lightning_robust.report.regions_scores import score_figure
from lightning_robust.report.tables import print_table, write_csv, write_json

__all__ = [
    "REGION_COLOURS",
    "AccuracyMatrix",
    "accuracy_matrices",
    "adversarial_examples",
    "atomic_file",
    "audit_figures",
    "blob_figure",
    "class_heatmaps",
    "class_pairs",
    "classes_reached",
    "contact_sheet",
    "curve",
    "gradient_ranges",
    "heatmap",
    "lambda_curves",
    "lambda_maps",
    "pixel_examples",
    "print_audit",
    "print_table",
    "region_examples",
    "region_representatives",
    "roc_curves",
    "save_figure",
    "score_figure",
    "sensitivity_histograms",
    "success_against_temperature",
    "success_bars",
    "to_uint8_image",
    "write_csv",
    "write_json",
]
