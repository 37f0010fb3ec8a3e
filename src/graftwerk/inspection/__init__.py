"""Description of what an adapter holds and has learnt, from its files alone."""
