"""Settings, each said once, and the functions and commands that take them. It loads no torch."""
