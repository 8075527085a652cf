"""Pure statistics of ``(X_0, X_t)``: no trainer, no files."""
