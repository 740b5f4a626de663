"""A recipe's evaluations: figures, files and pictures; and that a model which answers right scores 100 %."""

import json

import pytest

import mmjax
from mmjax.card import licence, write_card
from mmjax.config import Evaluation, Source
from mmjax.data import sources
from mmjax.data.messages import images
from mmjax.errors import UserError
from mmjax.evaluation import run
from tests import small_workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return small_workdir.write(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def model(workdir):
    return mmjax.load(workdir)


def test_an_untrained_model_is_scored_with_its_blind_twin(model, workdir, capsys):
    figures = run.evaluate(model, small_workdir.RECIPE, workdir)
    assert json.loads((workdir / "results.json").read_text()).items() >= figures.items()
    assert figures["questions"] == 10  # 12 of six kinds, without the sums
    assert {"accuracy", "accuracy_sum", "bleu4", "cider_d", "cider_d_shuffled"} <= set(figures)
    twins = [figures[f"accuracy_{twin}"] for twin in ("shuffled", "withheld", "most_frequent")]
    assert figures["accuracy_blind"] == max(twins)
    rows = [json.loads(line) for line in (workdir / "answers_scenes.jsonl").read_text().splitlines()]
    dataset = sources.open(small_workdir.RECIPE.evaluations["scenes"].source)
    assert [row["id"] for row in rows] == [dataset[i].id for i in range(12)]
    assert rows[0]["expected"] == list(dataset[0].answers) and rows[0]["question"].endswith("?")
    assert {"answer", "answer_shuffled", "answer_withheld", "answer_most_frequent", "right"} <= set(rows[0])
    assert (workdir / "answers_scenes.png").stat().st_size > 5000 and (workdir / "results_scenes.png").exists()
    printed = capsys.readouterr().out
    assert "all but sum" in printed and "position" in printed and "most_frequent" in printed


def test_the_card_says_what_was_measured_and_from_what(model, workdir):
    text = write_card(model, small_workdir.RECIPE, workdir).read_text()
    assert "| accuracy |" in text and "![Sample answers](answers_scenes.png)" in text
    assert "| instruct |" in text and "split held_out" in text and "fresh (llama)" in text
    assert "nan" not in text.lower().replace("finance", "")


def test_licences_are_read_where_they_are_stated(tmp_path):
    assert licence(str(tmp_path)) == "not stated" and licence(str(tmp_path / "absent")) == "not stated"
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# A model\nlicense: none\n")
    assert licence(str(tmp_path)) == "apache-2.0"


def test_a_model_that_sees_scores_all_and_its_blind_twin_does_not(workdir, monkeypatch):
    dataset = sources.open(small_workdir.RECIPE.evaluations["scenes"].source)
    truth = {dataset[i].id: (images(dataset[i].messages), dataset[i].answers[0]) for i in range(12)}

    def seer(model, samples, open_image, **settings):
        for sample in samples:
            shown, answer = truth[sample.id]
            yield sample, answer.upper() + "." if images(sample.messages) == shown else "9"

    monkeypatch.setattr(run, "answer", seer)
    figures = run.evaluate(None, small_workdir.RECIPE, workdir)
    assert figures["accuracy"] == figures["accuracy_sum"] == 1
    assert figures["bleu1"] == pytest.approx(100) and figures["accuracy_blind"] < 0.6


def test_several_evaluations_carry_their_names(workdir, monkeypatch):
    monkeypatch.setattr(run, "answer", lambda model, samples, open_image, **settings: ((s, "yes") for s in samples))
    source = Source(kind="digits", options={"split": "held_out", "size": 6})
    recipe = small_workdir.RECIPE
    recipe = type(recipe)(name="two", evaluations={"one": Evaluation(source), "two": Evaluation(source, limit=3)})
    figures = run.evaluate(None, recipe, workdir)
    assert figures["one_questions"] == 6 and figures["two_questions"] == 3 and "accuracy" not in figures


def test_an_unknown_metric_is_named(workdir):
    recipe = type(small_workdir.RECIPE)(evaluations={"x": Evaluation(metrics=("meteor",))})
    with pytest.raises(
        UserError, match="evaluations.x.metrics: unknown metric 'meteor'; there are accuracy, letter, bleu, cider, wer"
    ):
        run.evaluate(None, recipe, workdir)
