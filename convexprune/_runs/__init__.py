"""A run: its folder, who works on its layers, and what it will need."""
