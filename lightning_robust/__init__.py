"""Train, attack and watch image classifiers that must withstand adversarial attack.

Importing the package loads nothing heavy: ``lightning-robust --help`` answers without importing torch. Import what
you need from :mod:`lightning_robust.attacks`, :mod:`~lightning_robust.models`, :mod:`~lightning_robust.objectives`,
:mod:`~lightning_robust.metrics`, :mod:`~lightning_robust.modules`, :mod:`~lightning_robust.callbacks` and
:mod:`~lightning_robust.datamodules`.
"""

__version__ = "0.1.0"
