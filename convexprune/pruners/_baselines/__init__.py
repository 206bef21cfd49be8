"""Published methods, for comparison."""
