"""Training: setup, the training loop, checkpoints and bit-exact resume, run folders."""
