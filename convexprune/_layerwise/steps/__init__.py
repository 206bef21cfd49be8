"""What is done with one decoder layer: it is pruned, stage by stage, or surveyed."""
