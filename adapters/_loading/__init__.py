"""Models opened from a folder, the hub, a pack, or as they were given."""
