"""Search over a method's settings: its space, the study on disk, the trials and the final comparison on fresh rows."""
