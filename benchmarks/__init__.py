"""Measurements that a developer repeats and the docs quote; not shipped. Each is a module with a command line.

::

    python -m benchmarks.check_plan FILE             the memory plan against published or measured figures
    python -m benchmarks.measure_plan FILE           memory of real trainings on this machine's CPU
    python -m benchmarks.measure_skip_modules TEXT           layers in full precision against uniform NF4
    python -m benchmarks.quantization_layers TEXT    rounding errors, code books and outliers inside the layers
    python -m benchmarks.merge                       merging a large checkpoint against cp and peft
    python -m benchmarks.walk experiment=NAME        a recipe's whole line at full size under a memory cap
"""
