"""The frozen foundation model: find and load it, give it the images that it was trained on, keep its answers."""
