import dataclasses
import json
import re

import pytest
import torch

from coterie.artifact import open_artifact, write_artifact
from coterie.errors import CorruptArtifact, StaleArtifact
from coterie.evaluate.scorecard import Scorecard, environment
from coterie.evaluate.sums import Scores


def scores_of(**changes) -> Scores:
    scores = Scores(
        perplexity=12.5, perplexity_error=0.5, perplexity_rise=2.5, perplexity_rise_error=0.25, perplexity_ratio=1.25,
        perplexity_ratio_error=0.03, kl=0.25, kl_error=0.01, agreement=0.75, accuracy=None, tokens=1022, sequences=2,
        questions=0,
    )  # fmt: skip
    return {**scores, **changes}


def make_card(**changes) -> Scorecard:
    scores = scores_of()
    base = scores_of(kl=None, kl_error=None, agreement=None, perplexity_rise=None)
    card = Scorecard(
        model="small",
        model_digest="aa" * 32,
        base="original",
        base_digest="bb" * 32,
        text_digest="cc" * 32,
        seq_len=512,
        seed=7,
        domains={"código": scores},
        overall=scores,
        num_bytes=1000,
        bytes_ratio=0.5,
        memory_bytes=2000,
        peak_memory_bytes=3000,
        tokens_per_second=123.25,
        speed_ratio=1.5,
        environment=environment(torch.device("cpu"), torch.float32),
        base_domains={"código": base},
        base_overall=base,
    )
    return dataclasses.replace(card, **changes)


def test_a_scorecard_comes_back_as_it_was(tmp_path):
    card = make_card()
    path = card.save(tmp_path / "made" / "scorecard.json")
    assert Scorecard.load(path) == card


def test_a_scorecard_without_a_base_comes_back_as_it_was(tmp_path):
    card = make_card(base=None, base_digest=None, bytes_ratio=None, speed_ratio=None)
    path = card.save(tmp_path / "scorecard.json")
    assert Scorecard.load(path) == card
    assert json.loads(path.read_text())["inputs"].keys() == {"model", "text"}


def test_an_infinite_perplexity_comes_back(tmp_path):
    card = make_card(
        overall=scores_of(perplexity=float("inf"), perplexity_rise=float("inf"), kl=None, accuracy=0.5, questions=2)
    )
    assert Scorecard.load(card.save(tmp_path / "scorecard.json")) == card


def test_a_scorecard_from_before_there_were_errors_is_read(tmp_path):
    later = ("perplexity_error", "perplexity_rise", "perplexity_rise_error", "perplexity_ratio",
             "perplexity_ratio_error", "kl_error", "sequences")  # fmt: skip
    path = make_card().save(tmp_path / "scorecard.json")
    artifact = open_artifact(path, kind="scorecard")
    old = {name: value for name, value in scores_of().items() if name not in later}
    body = artifact.body | {"overall": old, "domains": {"código": old}}
    del body["base_domains"], body["base_overall"]
    write_artifact(path, kind="scorecard", body=body, inputs=artifact.inputs)
    expected = scores_of(**dict.fromkeys(later)) | {"sequences": 0}
    assert Scorecard.load(path) == make_card(
        overall=expected, domains={"código": expected}, base_domains={}, base_overall=None
    )


def test_digests_are_checked_on_request(tmp_path):
    path = make_card().save(tmp_path / "scorecard.json")
    Scorecard.load(path, inputs={"model": "aa" * 32, "base": "bb" * 32})
    with pytest.raises(StaleArtifact, match="another text"):
        Scorecard.load(path, inputs={"text": "dd" * 32})


def test_a_changed_scorecard_is_refused(tmp_path):
    path = make_card().save(tmp_path / "scorecard.json")
    path.write_text(path.read_text().replace("12.5", "11.5"))
    with pytest.raises(CorruptArtifact, match="digest"):
        Scorecard.load(path)


def test_a_missing_scorecard_is_refused(tmp_path):
    with pytest.raises(CorruptArtifact, match="does not exist"):
        Scorecard.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flavour": 1}, "flavour is 1: no such field is known"),
        ({"num_bytes": "many"}, "num_bytes is 'many': should be a whole number"),
        ({"num_bytes": True}, "num_bytes is True: should be a whole number"),
        ({"overall": None}, "overall is None: should be an object"),
        ({"speed_ratio": float("nan")}, "speed_ratio is nan: should be a finite number"),
        ({"speed_ratio": 10**400}, "should be a finite number"),
        ({"base": None}, "base is None: it has a digest, but no name"),
        ({"domains": {"code": {}}}, "domains.code.perplexity is missing"),
        ({"domains": {"\x1b[31m": 1}}, r"domains.'\x1b[31m' is 1: should be an object"),
        ({"base_domains": {"code": 1}}, "base_domains.code is 1: should be an object"),
        ({"base_overall": {"perplexity": 1.0}}, "base_overall.kl is missing"),
        ({"overall": scores_of(kl_error=-1.0)}, "overall.kl_error is -1.0: should be 0 or more"),
        ({"overall": scores_of(perplexity_rise_error=float("inf"))}, "overall.perplexity_rise_error is inf"),
        ({"overall": scores_of(sequences=-1)}, "overall.sequences is -1"),
        ({"tasks": {"arc": {"acc": "high"}}}, "tasks.arc.acc is 'high'"),
        ({"environment": {"torch": 2.5}}, "environment.torch is 2.5"),
    ],
)
def test_a_scorecard_that_says_what_cannot_be_names_file_and_field(tmp_path, changes, message):
    path = make_card().save(tmp_path / "scorecard.json")
    artifact = open_artifact(path, kind="scorecard")
    write_artifact(path, kind="scorecard", body=artifact.body | changes, inputs=artifact.inputs)
    with pytest.raises(CorruptArtifact, match=re.escape(message)) as caught:
        Scorecard.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


def test_a_scorecard_without_an_entry_names_it(tmp_path):
    path = make_card().save(tmp_path / "scorecard.json")
    body = dict(open_artifact(path, kind="scorecard").body)
    del body["seq_len"]
    write_artifact(path, kind="scorecard", body=body, inputs={"model": "a", "text": "b", "base": "c"})
    with pytest.raises(CorruptArtifact, match="seq_len is missing"):
        Scorecard.load(path)


def test_the_environment_says_what_it_ran_on():
    found = environment(torch.device("cpu"), torch.bfloat16)
    assert found["dtype"] == "bfloat16"
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert found["device_name"]
