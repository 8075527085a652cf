"""A run as something a person reads. Imports neither torch nor transformers."""
