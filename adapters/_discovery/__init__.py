"""What is in a decoder layer, found by watching it run."""
