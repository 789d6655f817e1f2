"""One file = one runner: what runs a bundle on the device."""
