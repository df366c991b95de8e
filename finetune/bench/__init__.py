"""Measurements that a user can repeat: each prints a table and ends with one line of JSON.

::

    from finetune.bench.start import measure_start

    measure_start(repeats=3)  # as `finetune bench start` does

The commands and their flags are in `finetune.cli.bench`.
"""
