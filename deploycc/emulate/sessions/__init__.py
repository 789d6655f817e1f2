"""One file = one runtime in the guest, named like the session that a bundle names."""
