"""The program ``lightning-robust``. Importing it, its help and its list of configs load nothing heavy."""

from __future__ import annotations

import difflib
import os
import sys

from lightning_robust.errors import UserError

COMMANDS = {
    "train": "fit, then test the best checkpoint: from data to the table of results",
    "fit": "train only",
    "validate": "evaluate on the validation images",
    "test": "evaluate on the test images: every number, table and figure",
    "predict": "write each test image's predicted class and its probability",
    "audit": "find out whether a model's robust accuracy can be trusted",
    "report": "make a page of HTML of a run, or of several side by side",
    "configs": "list the shipped configs",
}


def main(args: list[str] | None = None) -> None:
    """Run the program.

    Args:
        args: words of the command line; by default those of the process.

    Raises:
        SystemExit: with status 2 after a mistake in the user's input, which is printed as one short message.
    """
    words = sys.argv[1:] if args is None else list(args)
    if not words or words[0] in ("-h", "--help", "help"):
        _print_help()
        return
    try:
        if words[0] in ("-V", "--version"):
            from lightning_robust import __version__

            print(f"lightning-robust {__version__}")
        elif words[0] == "configs":
            from lightning_robust.cli.configs import print_configs

            print_configs(words[1:])
        elif words[0] == "audit":
            from lightning_robust.cli.audit import run_audit

            if status := run_audit(words):
                raise SystemExit(status)
        elif words[0] == "report":
            from lightning_robust.cli.report import report as make_report

            make_report(words[1:])
        elif words[0] == "train" and any(word.partition("=")[0] == "--seeds" for word in words):
            from lightning_robust.cli.seeds import train_seeds

            train_seeds(words)
        elif words[0] in COMMANDS:
            from lightning_robust.cli.run import run

            run(words)
        else:
            nearest = difflib.get_close_matches(words[0], COMMANDS, n=1)
            hint = f": did you mean {nearest[0]}?" if nearest else ""
            raise UserError(f"there is no command {words[0]!r}{hint} Commands: {', '.join(COMMANDS)}")
    except BrokenPipeError:  # `… | head` has read enough; without this Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        from lightning_robust.cli.messages import report

        report("interrupted")
        raise SystemExit(130) from None
    except Exception as error:
        from lightning_robust.cli.messages import report, spoken, users_mistake

        mistake = users_mistake(error)
        if mistake is not None:
            report(mistake)
        elif not spoken():  # else this process only lost its connection to the one that had something to say
            raise
        raise SystemExit(2) from None


def _print_help() -> None:
    width = max(map(len, COMMANDS))
    lines = [
        "usage: lightning-robust COMMAND [--config NAME] [--KEY VALUE ...]",
        "",
        "Train, attack and watch image classifiers that must withstand adversarial attack.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()),
        "",
        "options:",
        "  --config NAME       a shipped config (see: configs) or a YAML file; several merge, the last wins",
        "  --KEY VALUE         overrides what the configs say: --trainer.max_epochs 3, --model.objective Natural,",
        "                      --model.objective.attack.eps 8/255, --data.root DIR; --trainer.callbacks+=NAME adds one",
        "  --ckpt_path FILE    a checkpoint to test, or to go on from (last: the newest of this run's name)",
        "  --seeds N           train: repeat it with N seeds, and give mean ± standard deviation",
        "  --print_config      show the merged settings and stop",
        "  -h, --help          this text; after a command: all of its settings",
        "  -V, --version       the version",
        "",
        "examples:",
        "  lightning-robust train --config quickstart",
        "  lightning-robust train --config quickstart --model.objective Natural",
        "  lightning-robust train --config cifar10/at --config trainer/multi_gpu --data.root /path/to/data",
        "  lightning-robust test --ckpt_path runs/quickstart/version_0/checkpoints/last.ckpt",
        "  lightning-robust audit --ckpt runs/quickstart/version_0/checkpoints/last.ckpt --eps 0.2",
        "  lightning-robust report runs/quickstart/version_0 runs/quickstart/version_1",
    ]
    print("\n".join(lines))
