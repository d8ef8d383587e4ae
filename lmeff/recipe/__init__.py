"""Recipes: artifacts in, artifacts out."""
