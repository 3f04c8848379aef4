"""The core: knows no method by name."""
