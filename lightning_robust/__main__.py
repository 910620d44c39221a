"""``python -m lightning_robust``."""

from lightning_robust.cli import main

if __name__ == "__main__":
    main()
