"""Planning of a run before anything is loaded: memory, time, size."""
