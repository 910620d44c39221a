"""jsonargparse's parser with messages for people."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from pytorch_lightning.cli import LightningArgumentParser

from lightning_robust.cli.diagnosis import diagnose, nearest, parameters
from lightning_robust.cli.messages import shorten, users_mistake
from lightning_robust.cli.sources import sources
from lightning_robust.datamodules import ImageDataModule
from lightning_robust.errors import UserError
from lightning_robust.modules import ImageClassifier


class RobustParser(LightningArgumentParser):
    """Says what is wrong, where it stands, and what was probably meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the short message.

        Raises:
            UserError: always.
        """
        if not self.exit_on_error:  # a parser within the parser: the outer one speaks
            super().error(message, ex)
        words = sys.argv[1:]
        found = (
            diagnose(sources(words), self._roots(words[0]))
            or users_mistake(ex)
            or shorten(message, self._options(words[0]), nearest)
        )
        raise UserError(found) from None

    def _options(self, command: str) -> list[str]:
        """Dotted names of every option of a command."""
        subparsers = getattr(self, "_subcommands_action", None)
        parser = subparsers.choices.get(command, self) if subparsers is not None else self
        return [
            action.dest for action in parser._actions if action.dest and action.dest not in ("help", "==SUPPRESS==")
        ]

    def _roots(self, command: str) -> dict[str, Any]:
        """Settings of the top level and their types."""
        from lightning_robust.cli.run_settings import RunSettings
        from lightning_robust.cli.trainer import Trainer

        roots: dict[str, Any] = {name.partition(".")[0]: Any for name in self._options(command) if name != "config"}
        roots |= {"trainer": Trainer, "model": ImageClassifier, "data": ImageDataModule, "run": RunSettings}
        roots |= {"seed_everything": bool | int}
        arguments = parameters(Trainer)
        assert "max_epochs" in arguments  # Lightning's signature is what the diagnosis goes by
        return roots
