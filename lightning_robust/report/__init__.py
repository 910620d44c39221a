"""Figures and tables for people: pure functions from numbers to pictures and files."""

from lightning_robust.report.atomic import atomic_file
from lightning_robust.report.curves import curve
from lightning_robust.report.examples import adversarial_examples
from lightning_robust.report.figures import save_figure, to_uint8_image
from lightning_robust.report.heatmaps import class_heatmaps, heatmap
from lightning_robust.report.one_pixel import class_pairs, classes_reached, pixel_examples
from lightning_robust.report.tables import print_table, write_csv, write_json

__all__ = [
    "adversarial_examples",
    "atomic_file",
    "class_heatmaps",
    "class_pairs",
    "classes_reached",
    "curve",
    "heatmap",
    "pixel_examples",
    "print_table",
    "save_figure",
    "to_uint8_image",
    "write_csv",
    "write_json",
]
