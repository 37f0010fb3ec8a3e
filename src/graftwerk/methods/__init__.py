"""The methods: paper, equation, settings and module of each; mathematics only, no kernels."""
