"""Where activations come from: hookpoints, the measuring pass, prompt sets, the frozen reference."""
