"""QLoRA fine-tuning that proves what it did: plan, data, rehearse, train, merge, eval, export, report."""

__version__ = "0.1.0"
