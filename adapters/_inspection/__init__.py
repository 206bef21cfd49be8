"""A run looked at before it is begun: operators, sizes and needs, by the configuration alone."""
