"""Weights in files: of a decomposition, of packs, of the authors' released code."""
