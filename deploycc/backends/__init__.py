"""One file = one runtime: what it can run, how it is built for, how it is opened."""
