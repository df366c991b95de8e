"""``python -m finetune``; see `finetune.cli`."""

from finetune.cli import main
from finetune.launch.start import exit_process

if __name__ == "__main__":
    exit_process(main())
