"""The instructions, one module for each kind."""
