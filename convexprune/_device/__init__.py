"""What the machine can do, and kernels for it: number formats, fused work, threads, versions."""
