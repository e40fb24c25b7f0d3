"""The frozen foundation model: found, loaded, shown what it was trained on, remembered."""
