"""The rules of a Deploy application: reading, matching, and what the exporter writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lorkd_monai.apps.deploy.initial_rules import dicom_modalities, routing_text
from lorkd_monai.apps.deploy.runtime.dicom_rules import RoutingError, Rule, choose, no_rule, read_rules
from lorkd_monai.apps.expert_folders import ExpertFolder

NAMES = ["spleen_segmentation", "liver_segmentation"]
CT = {"Modality": "CT", "BodyPartExamined": "ABDOMEN", "SeriesDescription": "portal venous 2.0"}


def _rules(tmp_path: Path, text: str) -> list[Rule]:
    (tmp_path / "routing.yaml").write_text(text, encoding="utf-8")
    return read_rules(tmp_path / "routing.yaml", NAMES)


def test_one_matching_rule_is_chosen_whatever_the_case_and_spaces(tmp_path: Path) -> None:
    rules = _rules(
        tmp_path,
        "rules:\n- {experts: [spleen_segmentation], match: {Modality: ct, SeriesDescription: ['*PORTAL*', art*]}}\n"
        "- {experts: [liver_segmentation], match: {Modality: [MR]}}\n",
    )
    assert choose(rules, CT, "it").experts == ("spleen_segmentation",)
    assert choose(rules, {**CT, "Modality": " CT "}, "it").experts == ("spleen_segmentation",)
    assert choose(rules, {"Modality": "CT"}, "it") is None, "a tag of the rule must be there"
    assert choose(rules, {}, "it") is None


def test_a_rule_may_name_several_experts_and_an_empty_one_matches_nothing(tmp_path: Path) -> None:
    rules = _rules(
        tmp_path,
        "rules:\n- {experts: [spleen_segmentation, liver_segmentation], match: {Modality: CT}}\n"
        "- {experts: liver_segmentation, match: {}}\n- {experts: liver_segmentation}\n",
    )
    assert choose(rules, CT, "it").experts == tuple(NAMES)
    assert choose(rules[1:], CT, "it") is None
    assert "its match is empty" in str(no_rule(rules[1:], [("series 1", CT)]))


def test_two_matching_rules_are_an_error_that_names_both(tmp_path: Path) -> None:
    rules = _rules(
        tmp_path,
        "rules:\n- {experts: spleen_segmentation, match: {Modality: CT}}\n"
        "- {experts: liver_segmentation, match: {BodyPartExamined: ABD*}}\n",
    )
    with pytest.raises(RoutingError, match="series 1 .*matches 2 rules(.|\n)*spleen_seg(.|\n)*liver_seg"):
        choose(rules, CT, "series 1")


def test_no_rule_says_what_the_series_are_and_what_rules_there_are(tmp_path: Path) -> None:
    rules = _rules(tmp_path, "rules:\n- {experts: spleen_segmentation, match: {Modality: MR}}\n")
    text = str(no_rule(rules, [("series 1", {"Modality": "CT"})]))
    assert "series 1: Modality 'CT', no BodyPartExamined" in text and "spleen_segmentation: Modality MR" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [", "cannot be read"),
        ("- a", "expected one key, rules"),
        ("rules: []", "no rule in it"),
        ("rules:\n- {expert: spleen_segmentation}", "expected the keys experts and match"),
        ("rules:\n- {experts: lung_segmentation}", "rule 1: expected each expert once, of spleen_seg"),
        ("rules:\n- {experts: [spleen_segmentation, spleen_segmentation]}", "expected each expert once"),
        ("rules:\n- {experts: []}", "expected a text or a list of texts"),
        ("rules:\n- {experts: spleen_segmentation, match: {modality: CT}}", "patterns for some of Modality"),
        ("rules:\n- {experts: spleen_segmentation, match: {Modality: 3}}", "put quotes around it"),
        ("rules:\n- {experts: spleen_segmentation, match: {Modality: ['']}}", "expected a text"),
        ("rules:\n- !!python/object/apply:os.system ['touch x']", "cannot be read"),
    ],
)
def test_bad_rules_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        _rules(tmp_path, text)


def _expert(name: str, modality: str, part: str | None = None) -> ExpertFolder:
    formats = {"inputs": {"image": {"modality": modality, "spatial_shape": [1, 1]}}}
    return ExpertFolder(Path(name), {"network_data_format": formats, **({"body_part": part} if part else {})})


def test_written_rules_hold_dicom_codes_and_the_data_lists_text_as_text(tmp_path: Path) -> None:
    experts = [
        _expert("spleen_segmentation", "CT", "abdomen"),
        _expert("liver_segmentation", "MRI", "*"),
        _expert("odd_classification", "hyperspectral !!python/x: $(y)", "a: b\n- c"),
    ]
    text = routing_text(experts)
    written = yaml.safe_load(text)["rules"]
    assert written[0] == {
        "experts": ["spleen_segmentation"],
        "match": {"Modality": ["CT"], "BodyPartExamined": ["ABDOMEN"]},
    }
    assert written[1]["match"] == {"Modality": ["MR"], "BodyPartExamined": ["[*]"]}
    assert written[2]["match"] == {}, "an unknown modality is for a person to fill in"
    (tmp_path / "routing.yaml").write_text(text, encoding="utf-8")
    rules = read_rules(tmp_path / "routing.yaml", [e.name for e in experts])
    assert choose(rules, {"Modality": "MR", "BodyPartExamined": "BRAIN"}, "it") is None


@pytest.mark.parametrize(
    ("text", "codes"),
    [("ct", ["CT"]), ("X-ray", ["CR", "DX"]), ("Fundus photography", ["OP"]), ("unknown", []), (None, [])],
)
def test_modalities_become_dicom_codes(text: str | None, codes: list[str]) -> None:
    assert dicom_modalities(text) == codes
