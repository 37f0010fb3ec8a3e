"""Tasks learnt one after the other, and what each costs the ones before it."""
