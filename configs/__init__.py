"""Recipes: one file each; `get_config()` returns the whole config."""
