"""Training for real on CamVid: what each term does, and that fused and reference losses train the same network."""
