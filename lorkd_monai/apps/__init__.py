"""Expert bundles in other tools: MONAI Label and MONAI Deploy."""

from lorkd_monai.apps.deploy import write_deploy_app
from lorkd_monai.apps.label import write_label_app

__all__ = ["write_deploy_app", "write_label_app"]
