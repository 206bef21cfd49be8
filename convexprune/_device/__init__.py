"""The machine: number formats, fused kernels, threads, versions, memory, copies."""
