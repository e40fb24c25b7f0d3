"""The measured study: does decomposition pay?"""

from lorkd_monai.study.methods import METHODS, Method, methods_named
from lorkd_monai.study.plan import plan_runs, run_study
from lorkd_monai.study.settings import StudySettings, default_settings

__all__ = ["METHODS", "Method", "StudySettings", "default_settings", "methods_named", "plan_runs", "run_study"]
