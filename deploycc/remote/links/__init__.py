"""Ways to reach a device: one file = one scheme, named like its file; `registry` finds them."""
