"""Callbacks: what is measured while a Trainer runs, and what keeps a run safe."""

from lightning_robust.callbacks.adversarial_accuracy import AdversarialAccuracy
from lightning_robust.callbacks.attack_progress import AttackProgress
from lightning_robust.callbacks.attack_schedule import AttackSchedule
from lightning_robust.callbacks.audit import Audit
from lightning_robust.callbacks.catastrophic_overfitting import CatastrophicOverfitting
from lightning_robust.callbacks.distillation_study import DistillationStudy
from lightning_robust.callbacks.foreground_study import ForegroundStudy
from lightning_robust.callbacks.gray_box_table import GrayBoxTable
from lightning_robust.callbacks.input_gradient_map import InputGradientMap
from lightning_robust.callbacks.lambda_sweep import LambdaSweep
from lightning_robust.callbacks.masked_pgd import MaskedPGD
from lightning_robust.callbacks.measurement import Measurement
from lightning_robust.callbacks.mutation_detection import MutationDetection
from lightning_robust.callbacks.mutation_detection_predict import DetectAdversarial
from lightning_robust.callbacks.non_finite_guard import NonFiniteGuard
from lightning_robust.callbacks.one_pixel_study import OnePixelStudy
from lightning_robust.callbacks.pixel_iou import PixelIoU
from lightning_robust.callbacks.prediction_writer import PredictionWriter
from lightning_robust.callbacks.regions import RegionMaps
from lightning_robust.callbacks.regions_neutralizer import NeutralizerStudy
from lightning_robust.callbacks.robust_checkpoint import RobustCheckpoint, RobustEarlyStopping
from lightning_robust.callbacks.robustness_curve import RobustnessCurve
from lightning_robust.callbacks.run_page import RunPage
from lightning_robust.callbacks.run_results import RunResults
from lightning_robust.callbacks.wandb_run import WandbRun

__all__ = [
    "AdversarialAccuracy",
    "AttackProgress",
    "AttackSchedule",
    "Audit",
    "CatastrophicOverfitting",
    "DetectAdversarial",
    "DistillationStudy",
    "ForegroundStudy",
    "GrayBoxTable",
    "InputGradientMap",
    "LambdaSweep",
    "MaskedPGD",
    "Measurement",
    "MutationDetection",
    "NeutralizerStudy",
    "NonFiniteGuard",
    "OnePixelStudy",
    "PixelIoU",
    "PredictionWriter",
    "RegionMaps",
    "RobustCheckpoint",
    "RobustEarlyStopping",
    "RobustnessCurve",
    "RunPage",
    "RunResults",
    "WandbRun",
]
