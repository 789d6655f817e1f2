"""One file = one form a model can have: how it is hashed, counted, saved, loaded, run and described."""
