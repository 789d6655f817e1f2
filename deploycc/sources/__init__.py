"""Where models (`models/`) and data (`datasets/`) come from; one file = one kind."""
