"""Callbacks of the training loop: logging, health checks, evaluation, early stopping.

`base` has the protocol. The log files are listeners of the event bus (`jsonl`, `tensorboard`).
"""
