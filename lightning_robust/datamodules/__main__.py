"""``python -m lightning_robust.datamodules``."""

from lightning_robust.datamodules.prepare import main

if __name__ == "__main__":
    main()
