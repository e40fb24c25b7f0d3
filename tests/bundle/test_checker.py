"""Each single fault of a bundle is named by the checker, with its file; a sound bundle has none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from lorkd_monai.bundle import Problem, check_bundle, check_origin, pack_bundle
from lorkd_monai.cli import commands as cli
from lorkd_monai.errors import LoRKDError


@pytest.fixture
def bundle(make_case, tmp_path) -> Path:
    """A copy of a sound expert bundle, to be broken."""
    folder = make_case("2d_classification").folder
    return Path(shutil.copytree(folder, tmp_path / folder.name))


def edit(path: Path, *keys: str, value=None, remove: bool = False) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    item = content
    for key in keys[:-1]:
        item = item[key]
    if remove:
        del item[keys[-1]]
    else:
        item[keys[-1]] = value
    path.write_text(json.dumps(content, indent=4), encoding="utf-8")


def only(folder: Path, code: str, file: str, message: str, **options) -> Problem:
    """The bundle has problems of one code; return the first, which names the file and says ``message``."""
    problems = check_bundle(folder, thorough=False, **options)
    assert problems, "no problem was found"
    assert {problem.code for problem in problems} == {code}, [str(problem) for problem in problems]
    assert problems[0].file == file and message in problems[0].message, str(problems[0])
    return problems[0]


META, PRED = "configs/metadata.json", ("network_data_format", "outputs", "pred")


def test_a_sound_bundle(bundle, shared, tmp_path, monkeypatch):
    (schema,) = (shared / "schema").glob("meta_schema_*.json")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert check_bundle(bundle, schema=schema) == []
    assert not list(here.iterdir())


@pytest.mark.parametrize("name", ["LICENSE", "docs/README.md", "docs/data_license.txt", "configs/logging.conf"])
def test_missing_file(bundle, name):
    (bundle / name).unlink()
    only(bundle, "missing-file", name, "is missing")


@pytest.mark.parametrize("name", ["models/model.pt", META, "configs/inference.json"])
def test_missing_file_that_others_need(bundle, name):
    (bundle / name).unlink()
    problems = check_bundle(bundle)
    assert ("missing-file", name) in {(problem.code, problem.file) for problem in problems}


def test_the_fault_says_what_to_do(bundle):
    (bundle / "LICENSE").unlink()
    (problem,) = check_bundle(bundle)
    assert str(problem) == (
        "LICENSE: the file is missing; export the bundle again, or put the file back [missing-file]"
    )


def test_folder_name(bundle):
    only(bundle.rename(bundle.parent / "expert 1"), "name", ".", "'expert 1', expected <task>_classification")


def test_display_name(bundle):
    edit(bundle / META, "name", value=" ")
    problems = check_bundle(bundle, thorough=False)
    assert any(problem.code == "name" and "display name" in problem.message for problem in problems)


def test_broken_json(bundle):
    (bundle / "configs" / "train.json").write_text("{")
    only(bundle, "bad-json", "configs/train.json", "it is no JSON")


def test_indent(bundle):
    path = bundle / "configs" / "evaluate.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    only(bundle, "indent", "configs/evaluate.json", "indented by 4")


def without_ts(bundle: Path) -> Path:
    """The archive repeats metadata.json and inference.json: without it a change of those is one fault, not two."""
    (bundle / "models" / "model.ts").unlink()
    return bundle


def test_changelog(bundle):
    edit(without_ts(bundle) / META, "version", value="9.9.9")
    only(bundle, "changelog", META, "version '9.9.9' is not in 'changelog'")


@pytest.mark.parametrize("key", ["task", "authors", "schema", "numpy_version"])
def test_missing_metadata(bundle, key):
    edit(without_ts(bundle) / META, key, remove=True)
    codes = {problem.code for problem in check_bundle(bundle, thorough=False)}
    assert "schema" in codes and codes <= {"schema", "unpinned", "property"}


def test_the_schema_file_is_used(bundle, shared):
    (schema,) = (shared / "schema").glob("meta_schema_*.json")
    edit(without_ts(bundle) / META, "references", value="none")
    only(bundle, "schema", META, "references: 'none' is not of type 'array'", schema=schema)


def test_channel_names_and_count_disagree(bundle):
    edit(without_ts(bundle) / META, *PRED, "channel_def", value={"0": "a"})
    only(bundle, "channels", META, "num_channels is 3 but channel_def names the channels ['0']")


def test_wrong_channel_count(bundle):
    edit(without_ts(bundle) / META, *PRED, "channel_def", value={"0": "a", "1": "b"})
    edit(bundle / META, *PRED, "num_channels", value=2)
    only(bundle, "channels", META, "it says 2 output channels, the network gives 3")


def test_wrong_input_channels(bundle):
    edit(without_ts(bundle) / META, "network_data_format", "inputs", "image", "num_channels", value=1)
    edit(bundle / META, "network_data_format", "inputs", "image", "channel_def", value={"0": "image"})
    only(bundle, "channels", META, "does not take the input that it describes, (1, 1, 32, 32)")


def test_an_expression_in_the_metadata(bundle):
    edit(without_ts(bundle) / META, *PRED, "channel_def", "0", value="$__import__('os')")
    only(bundle, "expression", META, "MONAI would evaluate or replace the text")


@pytest.mark.parametrize("version", [">=0.5", "0.5.*", "", 5])
def test_unpinned_package(bundle, version):
    edit(without_ts(bundle) / META, "required_packages_version", "pytorch-ignite", value=version)
    only(bundle, "unpinned", META, f"pytorch-ignite has the version {version!r}")


def test_unlisted_package(bundle):
    edit(without_ts(bundle) / META, "required_packages_version", "pillow", remove=True)
    only(bundle, "unlisted-package", META, "the configs need pillow")


def test_our_package_in_a_config(bundle):
    path = bundle / "configs" / "evaluate.json"
    edit(path, "extra", value={"_target_": "lorkd_monai.handlers.Extra"})
    only(bundle, "not-stock", "configs/evaluate.json", "refers to 'lorkd_monai.handlers.Extra'")


@pytest.mark.parametrize("path", ["/home/ada/data/x", "C:\\Users\\ada\\x", "/Users/ada/x", "/workspace/data"])
def test_personal_path(bundle, path):
    readme = bundle / "docs" / "README.md"
    readme.write_text(readme.read_text() + f"\nSee {path} for more.\n")
    only(bundle, "personal-path", "docs/README.md", f"it holds the path {path!r}")


def test_personal_path_in_a_config(bundle):
    edit(bundle / "configs" / "train.json", "dataset_dir", value="/home/ada/data")
    only(bundle, "personal-path", "configs/train.json", "/home/ada/data")


def test_large_file(bundle, monkeypatch):
    monkeypatch.setattr("lorkd_monai.bundle.check.checker._LARGE", 2**14)
    problems = check_bundle(bundle, thorough=False)
    assert {problem.code for problem in problems} == {"large-file"}
    assert "models/model.pt" in {problem.file for problem in problems}


def list_large(bundle: Path, text: str, **entry: str) -> None:
    """Write large_files.yml: ``text``, or a list of the one file ``entry``."""
    (bundle / "large_files.yml").write_text(json.dumps({"large_files": [entry]}) if entry else text)


def test_large_file_with_a_wrong_hash(bundle, monkeypatch):
    limit = (bundle / "models" / "model.ts").stat().st_size
    monkeypatch.setattr("lorkd_monai.bundle.check.checker._LARGE", limit - 1)
    list_large(bundle, "", path="models/model.ts", url="https://example.org/model.ts", hash_val="0")
    problems = check_bundle(bundle, thorough=False)
    assert any(p.file == "models/model.ts" and "another hash" in p.message for p in problems)


@pytest.mark.parametrize("url", ["", "not uploaded yet", "file:///a/b", "https://", "https://example.org", "ftp://a/b"])
def test_large_file_without_an_address(bundle, url):
    list_large(bundle, "", path="models/model.ts", url=url)
    only(
        bundle,
        "large-file-url",
        "large_files.yml",
        f"models/model.ts has no address to be downloaded from, but {url!r}",
    )


@pytest.mark.parametrize(
    "text", ["[", "large_files: 3", "other: []", "- a", "large_files: [a]", "large_files: [{a: 1}]"]
)
def test_a_list_of_large_files_that_is_none(bundle, text):
    list_large(bundle, text)
    only(bundle, "large-file", "large_files.yml", "it cannot be read")


def test_a_large_export_waits_for_the_addresses_and_only_the_zoo_needs_them(make_case, tmp_path, monkeypatch):
    monkeypatch.setattr("lorkd_monai.bundle.writer.LARGE", 2**15)  # the weights alone are larger
    folder = make_case("2d_classification").write(tmp_path / "a_classification", formats=("pt",))
    problem = only(folder, "large-file-url", "large_files.yml", "models/model.pt has no address")
    assert "upload the file" in problem.fix
    assert check_bundle(folder, thorough=False, for_zoo=False) == []
    assert pack_bundle(folder, tmp_path).is_file()

    listed = folder / "large_files.yml"
    text = listed.read_text()
    address = next(line.split(": ", 1)[1] for line in text.splitlines() if "url" in line and "not uploaded" in line)
    listed.write_text(text.replace(address, '"https://example.org/file"'))
    assert check_bundle(folder, thorough=False) == []


def test_readme_section(bundle):
    readme = bundle / "docs" / "README.md"
    readme.write_text(readme.read_text().replace("## **Performance**", "## **Results**"))
    only(bundle, "readme", "docs/README.md", "the section 'Performance' is missing")


def test_readme_without_its_warning(bundle):
    readme = bundle / "docs" / "README.md"
    readme.write_text(readme.read_text().replace("Not for clinical use", "For all use"))
    only(bundle, "readme", "docs/README.md", "not for clinical use")


def test_licences(bundle):
    (bundle / "LICENSE").write_text("all rights reserved")
    only(bundle, "licence", "LICENSE", "not the Apache License")


def test_empty_data_licence(bundle):
    (bundle / "docs" / "data_license.txt").write_text("\n")
    only(bundle, "licence", "docs/data_license.txt", "it is empty")


@pytest.mark.parametrize("key", ["evaluator", "dataset_dir", "preprocessing", "device"])
def test_missing_property(bundle, key):
    edit(without_ts(bundle) / "configs" / "inference.json", key, remove=True)
    problems = check_bundle(bundle, thorough=False)
    assert problems and {problem.code for problem in problems} == {"property"}
    assert {problem.file for problem in problems} == {"configs/inference.json"}


def test_label_needs_literal_handlers(bundle):
    edit(bundle / "configs" / "train.json", "train", "handlers", value="@handlers")
    problems = check_bundle(bundle, thorough=False)
    assert any("literal list train#handlers" in problem.message for problem in problems)


def test_damaged_weights(bundle):
    path = bundle / "models" / "model.pt"
    path.write_bytes(path.read_bytes()[:1000])
    only(bundle, "weights", "models/model.pt", "it cannot be read")


def test_weights_that_are_code(bundle):
    torch.save({"weight": os.path.join}, bundle / "models" / "model.pt")
    only(bundle, "weights", "models/model.pt", "it cannot be read")


def test_nested_weights(bundle):
    torch.save({"model": {"weight": torch.zeros(1)}}, bundle / "models" / "model.pt")
    only(bundle, "weights", "models/model.pt", "expected a flat state_dict")


def test_weights_of_another_network(bundle):
    torch.save({"weight": torch.zeros(1)}, bundle / "models" / "model.pt")
    only(bundle, "weights", "models/model.pt", "it does not fit network_def")


def test_other_formats_of_older_weights(bundle):
    path = bundle / "models" / "model.pt"
    weights = torch.load(path, weights_only=True)
    torch.save({key: value + 1 if value.is_floating_point() else value for key, value in weights.items()}, path)
    problems = check_bundle(bundle, thorough=False)
    assert {problem.code for problem in problems} == {"formats"}
    assert [problem.file for problem in problems] == [
        "models/model.safetensors",
        "models/model.ts",
        "models/model.onnx",
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "model.ts", "model.onnx"])
def test_damaged_format(bundle, name):
    (bundle / "models" / name).write_bytes(b"nothing")
    only(bundle, "formats", f"models/{name}", "")


def test_renamed_torchscript(bundle):
    models = bundle / "models"
    (models / "model.ts").rename(models / "expert.ts")
    only(bundle, "renamed-ts", "models/expert.ts", "root is 'model': the file was renamed")


def test_archive_with_older_configs(bundle):
    edit(bundle / META, "authors", value="somebody else")
    only(bundle, "archive", "models/model.ts", "extra/metadata.json is missing or not configs/metadata.json")


def test_a_network_that_has_to_be_traced(make_case, bundle, monkeypatch):
    def fails(*_args, **_more):
        raise RuntimeError("this network cannot be scripted")

    monkeypatch.setattr("torch.jit.script", fails)
    (problem,) = check_bundle(bundle)
    assert problem.code == "torchscript" and "ckpt_export by script fails" in problem.message
    edit(without_ts(bundle) / META, "torchscript", value="trace")
    assert check_bundle(bundle) == []


STRANGE = (None, -1, 10**12, "", [], {}, [1], {"a": 1}, "é", True)
PLACES = (
    (META, "version"), (META, "changelog"), (META, "network_data_format"), (META, *PRED), (META, *PRED, "channel_def"),
    (META, *PRED, "num_channels"), (META, "network_data_format", "inputs", "image", "spatial_shape"),
    (META, "network_data_format", "inputs", "image", "num_channels"), ("configs/train.json", "train"),
    ("configs/inference.json", "network_def"),
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[-1])
def test_whatever_stands_there_is_reported_and_never_a_crash(bundle, place):
    file, *keys = place
    for name in ("model.ts", "model.onnx", "model.safetensors", "model.pt"):
        (bundle / "models" / name).unlink()
    before = (bundle / file).read_text(encoding="utf-8")
    for value in STRANGE:
        (bundle / file).write_text(before, encoding="utf-8")
        edit(bundle / file, *keys, value=value)
        # The weights are missing, which is one problem; there must be another one.
        assert len(check_bundle(bundle, thorough=False)) > 1, value


def test_files_that_are_no_text(bundle):
    for name in ("configs/train.json", "docs/README.md", "docs/data_license.txt"):
        (bundle / name).write_bytes(b"\xff\xfe\x00")
    problems = check_bundle(bundle, thorough=False)
    assert {problem.file for problem in problems} >= {"configs/train.json", "docs/README.md"}


def test_no_folder(tmp_path):
    with pytest.raises(LoRKDError, match="expected the folder of a bundle, got .*nothing"):
        check_bundle(tmp_path / "nothing")


def test_what_names_no_licence_or_authors_is_said_and_passes(bundle):
    assert check_bundle(bundle) == []
    found = [(warning.code, warning.file) for warning in check_origin(bundle)]
    assert found == [("no-licence", "docs/data_license.txt"), ("no-authors", META)]
    *warnings, last = cli.check(str(bundle)).splitlines()
    assert len(warnings) == 2 and all(line.startswith("warning: ") for line in warnings)
    assert last.endswith("nothing to complain about")
    (bundle / "docs" / "data_license.txt").write_text("CC BY 4.0")
    edit(bundle / META, "authors", value="A. Nurse")
    (bundle / "models" / "model.ts").unlink()  # it holds the metadata as it was
    assert check_origin(bundle) == []
    assert cli.check(str(bundle)).splitlines() == [last]


@pytest.mark.parametrize("content", ["{", "[]", '{"authors": 3}'])
def test_the_warnings_take_any_metadata(bundle, content):
    (bundle / META).write_text(content)
    assert [warning.code for warning in check_origin(bundle)] == ["no-licence"]
    with pytest.raises(SystemExit):
        cli.check(str(bundle))
