"""The command line: one table of commands, their flags, help, and exit codes.

from finetune.cli import main

exit_code = main(["plan", "+experiment=quickstart", "--fit"])
"""

from finetune.cli.dispatch import main

__all__ = ["main"]
