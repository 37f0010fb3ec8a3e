"""The tasks: reading rows, encoding them, collating batches, computing losses and decoding answers."""
