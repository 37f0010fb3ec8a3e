"""New training rows made out of given ones: noise on words, and translation by a model."""
