"""Reports of runs and comparisons as one HTML file, drawn from their files alone."""
