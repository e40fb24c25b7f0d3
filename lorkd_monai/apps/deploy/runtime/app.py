"""A MONAI Deploy application with many experts: routing.yaml names the experts for each series, by its DICOM tags.

    python app.py -i INPUT -o OUTPUT

INPUT is a folder of DICOM files (any number of studies), of NIfTI files or of pictures; OUTPUT gets DICOM SEG, JSON
and DICOM SR, NIfTI or PNG files. Research only; not for clinical use.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from lorkd_deploy.dicom_rules import RoutingError, read_rules  # noqa: E402
from lorkd_deploy.operators import ExpertOperator, RouteOperator, WriteOperator  # noqa: E402
from lorkd_deploy.shared_weights import ExpertError, ExpertPool  # noqa: E402
from monai.deploy.conditions import CountCondition  # noqa: E402
from monai.deploy.core import AppContext, Application  # noqa: E402
from monai.deploy.operators import DICOMDataLoaderOperator  # noqa: E402


class ExpertsApplication(Application):
    """Load DICOM, route, run the experts, write."""

    def compose(self) -> None:
        context: AppContext = Application.init_app_context(self.argv)
        source, output = Path(context.input_path).resolve(), Path(context.output_path).resolve()
        if not source.is_dir():
            raise RoutingError(f"expected a folder of images as the input (-i), but {source} is not a folder")
        models = Path(context.model_path)
        # Without -m the SDK gives "models" in the working directory, even if there is no such folder.
        pool = ExpertPool(models if next(models.glob("*/configs/metadata.json"), None) else HERE / "models")
        names = list(pool.experts)
        rules = read_rules(HERE / "routing.yaml", names)
        once = CountCondition(self, 1)
        load = DICOMDataLoaderOperator(self, once, input_folder=source, must_load=False, name="load")
        route = RouteOperator(self, folder=source, rules=rules, experts=names, name="route")
        run = ExpertOperator(self, pool=pool, name="run_experts")
        write = WriteOperator(self, output=output, name="write")
        self.add_flow(load, route, {("dicom_study_list", "studies")})
        self.add_flow(route, run, {("jobs", "jobs")})
        self.add_flow(run, write, {("answers", "answers")})


def main() -> int:
    logging.getLogger("lorkd").setLevel(logging.INFO)
    try:
        ExpertsApplication().run()
    except (RoutingError, ExpertError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
