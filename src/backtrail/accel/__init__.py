"""Optional speed: everything in here leaves results unchanged up to rounding."""
