"""Expert bundles served by MONAI Label."""

from lorkd_monai.apps.label.writer import write_label_app

__all__ = ["write_label_app"]
