"""Many images: drawn on all devices, written in shards."""
