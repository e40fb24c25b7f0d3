"""The code of an exported MONAI Deploy application; it is copied there and imports nothing of lorkd_monai."""
