"""Settings, declared once, and the signatures made from settings. No module here loads torch."""
