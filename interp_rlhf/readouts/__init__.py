"""What is read from activations: directions now, probes and dictionary features later."""
