"""Measures QLoRA training on one GPU next to TRL's trainer, on a base that is made on the spot::

    make check-gpu                          # or: python -m benchmarks.gpu [FILE]
    python -m benchmarks.gpu FILE --tiny    # two narrow layers, on a CPU too: shows that the script works

The last line is JSON, also written to FILE (outputs/check-gpu.json).
"""
