"""Bundles on devices: reach one, copy the bundle there, check and measure it, clean up. `links/` holds one file per way to reach one."""
