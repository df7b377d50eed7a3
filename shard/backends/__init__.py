"""What a device computes; one file per device."""
