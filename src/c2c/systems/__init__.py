"""What cache-to-cache is compared with."""
