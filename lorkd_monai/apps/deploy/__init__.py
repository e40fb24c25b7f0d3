"""Expert bundles in one application of MONAI Deploy."""

from lorkd_monai.apps.deploy.writer import write_deploy_app

__all__ = ["write_deploy_app"]
