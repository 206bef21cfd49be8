"""Files and tensors on the disk, whole or not at all."""
