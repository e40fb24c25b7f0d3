"""What an exported MONAI Deploy application is made of; it is copied there and imports nothing of lorkd_monai."""
