"""What travels to the device: standard library, numpy and the runtime. Imports nothing of deploycc but `errors`."""
