"""One file = one kind of model source, named like its file."""
