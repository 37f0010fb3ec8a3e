"""What happens around the training loop: logging, health checks, evaluation, early stopping, each in a callback.

`base` has the protocol. The log files are listeners of the event bus (`jsonl`, `tensorboard`, wired by `log_files`).
"""
