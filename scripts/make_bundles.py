"""Makes the four training bundles from scripts/bundle_templates: run it where a template has changed.

    python scripts/make_bundles.py [--check]

With --check nothing is written, and a file that is not up to date ends with exit code 1.

A template is where its file is in each bundle: `configs/train.yaml`, `docs/README.md`. It is a Jinja template that
writes a value as `[[ name ]]`, since configs are full of braces. `bundles.yaml` has the values that differ from bundle
to bundle, `networks.yaml` the networks; `lorkd_monai/settings.py` says what each key of train.yaml is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jinja2
import yaml

from lorkd_monai.settings import BUNDLE_SETTINGS

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "scripts" / "bundle_templates"
NOTICE = "# Made by scripts/make_bundles.py; the template is scripts/bundle_templates/{}.\n"
# Defaults that are expressions, as a user reads them.
PLACES = {
    "dataset_dir": "<bundle_root>/data",
    "output_dir": "<bundle_root>/output",
    "teacher_bundle": "<output_dir>/teacher",
    "device": "cuda:0 where there is one, else cpu",
}


def files_of(name: str, values: dict, templates: jinja2.Environment) -> dict[str, str]:
    """The files of one bundle, by their places in it."""
    dims, work = name.split("_")
    values = {**values, "dims": int(dims[0]), "work": work, "patches": name == "3d_segmentation"}
    files = {"LICENSE": (ROOT / "LICENSE").read_text(encoding="utf-8")}
    for path in sorted((TEMPLATES / "configs").iterdir()):
        place = f"configs/{path.name}"
        text = templates.get_template(place).render(values)
        if path.suffix == ".json":
            text = json.dumps(json.loads(text), indent=4, ensure_ascii=False) + "\n"
        files[place] = NOTICE.format(place) + text if path.suffix == ".yaml" else text
    table = settings_table(yaml.safe_load(files["configs/train.yaml"]))
    files["docs/README.md"] = templates.get_template("docs/README.md").render(values, settings=table)
    return files


def settings_table(config: dict) -> str:
    """The rows that say what can be set in train.yaml."""
    rows = []
    for key in list(config)[1 : list(config).index("initialize")]:
        if key not in BUNDLE_SETTINGS:
            sys.exit(f"error: say in lorkd_monai/settings.py what {key!r} is")
        text, value = BUNDLE_SETTINGS[key].text, config[key]
        if isinstance(value, dict):
            default = f"see configs/train.yaml: {value['_target_']}"
        else:
            default = f"`{PLACES.get(key) or (value if isinstance(value, str) else json.dumps(value))}`"
        rows.append(f"| `{key}` | {default} | {text} |")
    return "\n".join(rows)


def main() -> None:
    """Write or check the bundles."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES, encoding="utf-8"), undefined=jinja2.StrictUndefined,
        variable_start_string="[[", variable_end_string="]]", trim_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    bundles = yaml.safe_load((TEMPLATES / "bundles.yaml").read_text(encoding="utf-8"))
    stale = []
    for name, values in bundles.items():
        for place, text in files_of(name, values, templates).items():
            file = ROOT / "bundles" / f"lorkd_{name}" / place
            if file.is_file() and file.read_text(encoding="utf-8") == text:
                continue
            stale.append(str(file.relative_to(ROOT)))
            if "--check" not in sys.argv:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8", newline="\n")
    if stale and "--check" in sys.argv:
        sys.exit(f"error: {', '.join(stale)} not up to date: run python scripts/make_bundles.py")


if __name__ == "__main__":
    main()
