"""Writing a report: a Markdown page with pictures as PNG, and all of it in one HTML file that needs no network."""

from __future__ import annotations

import html
import importlib.util
import os
from pathlib import Path

from lorkd_monai.errors import LoRKDError

__all__ = ["write_report"]


def write_report(folder: str | os.PathLike, output: str | os.PathLike | None = None, resamples: int = 2000) -> Path:
    """Write the report of a study, or of a bundle's output folder, and return the HTML file.

    Args:
        folder: of `lorkd study`, or the ``output_dir`` of a training bundle.
        output: folder for ``report.html``, ``report.md`` and the pictures; ``report`` in ``folder`` by default.
        resamples: of the bootstrap intervals.

    Raises:
        LoRKDError: there is nothing to show, a file can't be read, or the extra ``report`` is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LoRKDError(f"{folder} is no folder: expected that of a study, or the output folder of a training bundle")
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise LoRKDError(f"a report needs {' and '.join(missing)}: pip install 'lorkd-monai[report]'")
    import jinja2

    from lorkd_monai.files import atomic_file
    from lorkd_monai.report.run_source import content_of_run
    from lorkd_monai.report.sections import Sections
    from lorkd_monai.report.study_source import content_of_study, is_study

    content = content_of_study(folder, resamples) if is_study(folder) else content_of_run(folder)
    output = folder / "report" if output is None else Path(output)
    drawing = Sections()
    sections = drawing.of(content)
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("lorkd_monai.report", "templates"),
        autoescape=lambda name: name is not None and name.endswith("html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters["cell"] = lambda text: html.escape(str(text), quote=False).replace("|", "\\|").replace("\n", " ")
    files = dict(drawing.files)
    for name in ("report.md", "report.html"):
        text = templates.get_template(f"{name}.j2").render(content=content, sections=sections)
        files[name] = text.encode("utf-8")
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            with atomic_file(output / name) as temporary:
                temporary.write_bytes(data)
    except OSError as error:
        raise LoRKDError(
            f"the report can't be written to {output}: {error}. Name another folder by --output"
        ) from error
    return output / "report.html"
