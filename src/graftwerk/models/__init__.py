"""Base models: finding, checking and loading them, their positions, and the hardware they run on."""
