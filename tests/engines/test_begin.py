"""The start of a run: one process in a folder, and only the run that its checkpoint belongs to."""

import os

import pytest
import torch

from lorkd_monai.engines import begin_run, end_run
from lorkd_monai.errors import LoRKDError
from lorkd_monai.locks import claimed

STATE = {"network": {}, "objects": {}, "epoch": 1, "best": {}, "settings": {"seed": 0, "rank": {"a": 2}}}


def test_a_run_of_its_own_settings_begins(tmp_path):
    begin_run(tmp_path / "new", {"seed": 1})
    begin_run(tmp_path / "new", {"seed": 1})  # once more in this process
    torch.save(STATE, tmp_path / "last.pt")
    begin_run(tmp_path, {"seed": 0, "rank": {"a": 2}, "data": {"tasks": ["a"]}})  # an older checkpoint has no data
    end_run()
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 1, "rank": {"a": 2}}, "other settings: seed was 0, now 1"),
        ({"seed": 0, "rank": {"a": 3}}, "rank: a was 2, now 3"),
        ({"seed": 0}, "rank was {'a': 2}, now None"),
        ({"seed": 0, "rank": {"a": 2}, "ema": 0.5}, "ema was None, now 0.5"),
    ],
)
def test_a_run_of_other_settings_is_refused(settings, words, tmp_path):
    torch.save(STATE, tmp_path / "last.pt")
    with pytest.raises(LoRKDError, match=words):
        begin_run(tmp_path, settings)
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_checkpoint_that_is_none_is_refused(tmp_path):
    (tmp_path / "last.pt").write_text("garbage")
    with pytest.raises(LoRKDError, match="can't be resumed from.*Delete it"):
        begin_run(tmp_path, {})


def test_the_claim_is_free_for_others_after_a_refusal(tmp_path):
    torch.save(STATE, tmp_path / "last.pt")
    with pytest.raises(LoRKDError, match="other settings"):
        begin_run(tmp_path, {})
    with claimed(tmp_path, ""):
        pass
