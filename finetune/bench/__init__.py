"""Measurements that a user can repeat: each prints a table and ends with one line of JSON.

::

    from finetune.bench import bench

    bench(["quantization", "model=my/model", "text=my.txt"])
"""

from finetune.bench.verb import bench

__all__ = ["bench"]
