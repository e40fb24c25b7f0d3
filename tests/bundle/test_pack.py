"""A packed expert comes back whole through MONAI's own download, and loads safely."""

from __future__ import annotations

import os
import zipfile

import pytest
import torch

from lorkd_monai.bundle import load_expert, pack_bundle, push_bundle
from lorkd_monai.errors import LoRKDError


def test_monai_downloads_what_was_packed(make_case, tmp_path, monkeypatch):
    import monai.bundle

    folder = make_case("2d_classification").folder
    packed = pack_bundle(folder, tmp_path / "out")
    assert packed == tmp_path / "out" / f"{folder.name}.zip"
    monkeypatch.chdir(tmp_path)
    monai.bundle.download(
        folder.name, url=packed.as_uri(), bundle_dir=str(tmp_path / "got"), source="github", progress=False
    )
    got = tmp_path / "got" / folder.name
    for path in folder.rglob("*"):
        if path.is_file():
            assert (got / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_packing_twice_gives_the_same_bytes_and_leaves_results_out(make_case, tmp_path):
    folder = make_case("3d_segmentation").folder
    first = pack_bundle(folder, tmp_path / "a.zip", check=False).read_bytes()
    (folder / "eval").mkdir()
    (folder / "eval" / "patient.csv").write_text("1")
    (folder / ".hidden").write_text("1")
    try:
        assert pack_bundle(folder, tmp_path / "b.zip", check=False).read_bytes() == first
    finally:
        (folder / "eval" / "patient.csv").unlink()
        (folder / "eval").rmdir()
        (folder / ".hidden").unlink()
    assert {name.split("/")[0] for name in zipfile.ZipFile(tmp_path / "b.zip").namelist()} == {folder.name}


def test_refusals(make_case, tmp_path):
    folder = make_case("2d_classification").folder
    with pytest.raises(LoRKDError, match="has no configs/metadata.json"):
        pack_bundle(tmp_path)
    (tmp_path / f"{folder.name}.zip").write_text("mine")
    with pytest.raises(LoRKDError, match="exists already"):
        pack_bundle(folder, tmp_path)
    broken = tmp_path / folder.name
    (broken / "configs").mkdir(parents=True)
    (broken / "configs" / "metadata.json").write_text("{}")
    with pytest.raises(LoRKDError, match="not fit to be shared; fix this first"):
        pack_bundle(broken, tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()


def test_load_expert(make_case, tmp_path, monkeypatch):
    case = make_case("3d_classification")
    monkeypatch.chdir(tmp_path)
    network, image = load_expert(case.folder), torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(network(image), case.network(image))
    with pytest.raises(LoRKDError, match="inference.json is missing"):
        load_expert(tmp_path)


def test_load_expert_refuses_code(make_case, tmp_path):
    folder = make_case("2d_classification").write(tmp_path / "a_classification", formats=("pt",))
    torch.save({"weight": os.path.join}, folder / "models" / "model.pt")
    with pytest.raises(LoRKDError, match="no state_dict that can be read safely"):
        load_expert(folder)


def test_push_works_on_a_copy(make_case, monkeypatch):
    folder, seen = make_case("2d_classification").folder, {}

    def push(repo, name, bundle_dir, **more):
        seen.update(repo=repo, name=name, files=sorted(os.listdir(os.path.join(bundle_dir, name))), **more)
        assert not folder.samefile(os.path.join(bundle_dir, name))
        return "url"

    monkeypatch.setattr("monai.bundle.push_to_hf_hub", push)
    monkeypatch.setattr("lorkd_monai.bundle.pack.util.find_spec", lambda name: object())
    assert push_bundle(folder, "user/name", version="0.1.0") == "url"
    assert seen["repo"] == "user/name" and seen["name"] == folder.name and seen["private"] is True
    assert seen["files"] == ["LICENSE", "configs", "docs", "models"]


def test_push_without_the_hub(make_case, monkeypatch):
    monkeypatch.setattr("lorkd_monai.bundle.pack.util.find_spec", lambda name: None)
    with pytest.raises(LoRKDError, match="pip install huggingface_hub"):
        push_bundle(make_case("2d_classification").folder, "user/name")


@pytest.mark.parametrize("repo", ["name", "a/b/c", "../x", "a b/c", "", None, "é/x"])
def test_push_to_what_is_no_repository(make_case, repo):
    with pytest.raises(LoRKDError, match="expected the name of a repository on the Hub, user/name, got"):
        push_bundle(make_case("2d_classification").folder, repo)


def test_push_that_the_hub_refuses_is_one_message(make_case, monkeypatch):
    def refuse(**_more):
        raise OSError("no route to host\nmany more lines")

    monkeypatch.setattr("monai.bundle.push_to_hf_hub", refuse)
    monkeypatch.setattr("lorkd_monai.bundle.pack.util.find_spec", lambda name: object())
    with pytest.raises(LoRKDError, match="did not take .* into user/name: no route to host; log in with") as caught:
        push_bundle(make_case("2d_classification").folder, "user/name")
    assert "\n" not in str(caught.value)
