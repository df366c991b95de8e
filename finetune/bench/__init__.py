"""Measurements that a user can repeat: each prints a table and ends with one line of JSON."""

from finetune.bench.verb import bench

__all__ = ["bench"]
