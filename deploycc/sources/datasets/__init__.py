"""One file = one kind of data source, named like its file."""
