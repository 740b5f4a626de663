"""The jobs that use a trained workdir: generate, chat, export."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

import mmjax
from mmjax import config
from mmjax.data.messages import Sample, validated
from mmjax.errors import UserError
from mmjax.inference.answering import answer
from mmjax.jobs import chat, evaluate, export, generate
from tests import small_workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return small_workdir.write(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def model(workdir):
    """With every leaf random, so that adapters do something and answers differ."""
    fresh = mmjax.load(workdir)
    leaves, structure = jax.tree.flatten(fresh.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    return dataclasses.replace(fresh, params=jax.tree.unflatten(structure, drawn))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A folder with pictures and a JSONL of eleven questions about them, of which one picture is broken, one absent."""
    folder = tmp_path_factory.mktemp("asked")
    lines = []
    for i in range(11):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        text = {"type": "text", "text": "What is it?" if i % 2 else "How many digits are there, and which?"}
        content = [text] if i == 8 else [{"type": "image", "path": f"{i}.png"}, text]
        lines.append({"id": f"q{i}", "messages": [{"role": "user", "content": content}]})
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "5.png").unlink()
    (folder / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "asked.jsonl"


SETTINGS = config.Generate(max_new_tokens=4, batch=4)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_is_answered_in_batches_as_one_by_one(model, asked, tmp_path):
    output = tmp_path / "out.jsonl"
    generate.answer_file(model, dataclasses.replace(SETTINGS, input=str(asked)), output)
    found = {row["id"]: row for row in lines(output)}
    assert set(found) == {f"q{i}" for i in range(11)}
    assert "readable" in found["q3"]["error"] and "no such file" in found["q5"]["error"]
    for row in lines(asked):
        if "answer" in found[row["id"]]:
            content = [
                {**part, "path": str(asked.parent / part["path"])} if part["type"] == "image" else part
                for part in row["messages"][0]["content"]
            ]
            alone = model.chat([{"role": "user", "content": content}], 4)
            assert found[row["id"]]["answer"] == alone
    assert len({row.get("answer") for row in found.values()}) > 2


def test_an_interrupted_job_goes_on_where_it_stopped(model, asked, tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    settings = dataclasses.replace(SETTINGS, input=str(asked))
    generate.answer_file(model, settings, whole)
    kept = whole.read_text().splitlines(keepends=True)
    output.write_text("".join(kept[:5]) + kept[5][:9])  # killed in the middle of a line
    generate.answer_file(model, settings, output)
    assert sorted(output.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    generate.answer_file(model, settings, output)  # nothing is left to do
    assert len(lines(output)) == 11


def test_what_cannot_be_told_apart_or_understood_is_an_error(model, asked, tmp_path):
    twice = tmp_path / "twice.jsonl"
    twice.write_text(lines_of := asked.read_text().splitlines(keepends=True)[8] * 2)
    assert lines_of
    settings = dataclasses.replace(SETTINGS, input=str(twice))
    with pytest.raises(UserError, match="'q8' stands twice"):
        generate.answer_file(model, settings, tmp_path / "out.jsonl")
    (tmp_path / "other.jsonl").write_text("[1, 2]\n")
    with pytest.raises(UserError, match="something else than answers"):
        generate.answer_file(model, settings, tmp_path / "other.jsonl")
    with pytest.raises(UserError, match="either generate.prompt"):
        generate.run(config.Recipe(), tmp_path)


def test_the_job_answers_one_prompt_about_one_picture(workdir, asked, capsys):
    picture = str(asked.parent / "0.png")
    settings = dataclasses.replace(SETTINGS, prompt="What is it?", image=picture)
    generate.run(dataclasses.replace(small_workdir.RECIPE, generate=settings), workdir)
    content = [{"type": "image", "path": picture}, {"type": "text", "text": "What is it?"}]
    expected = mmjax.load(workdir).chat([{"role": "user", "content": content}], 4)
    assert capsys.readouterr().out == expected + "\n"


def test_a_last_answer_is_not_shown_to_the_model(model):
    messages = [{"role": "user", "content": "Is there a 7?"}, {"role": "assistant", "content": "yes"}]
    question, whole = Sample("a", validated(messages[:1])), Sample("b", validated(messages))
    (_, first), (_, second) = answer(model, [question, whole], batch=2, max_new_tokens=4)
    assert first == second


def test_chat_keeps_the_conversation_and_says_what_is_wrong(model, asked):
    picture = asked.parent / "0.png"
    typed = ["/image /nowhere.png\n", f"/image {picture}\n", "What is it?\n", "\n", "Is there a 7?\n", "/hello\n"]
    typed += ["/reset\n", "Is there a 7?\n", "/quit\n", "never read\n"]
    out = io.StringIO()
    chat.talk(model, SETTINGS, typed, out)
    said = out.getvalue().split("\n")
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "What is it?"}]
    conversation = [{"role": "user", "content": content}]
    first = model.chat(conversation, 4)
    conversation += [{"role": "assistant", "content": first}, {"role": "user", "content": "Is there a 7?"}]
    again = model.chat([{"role": "user", "content": "Is there a 7?"}], 4)
    assert "no such file" in said[0] and "goes with the next question" in said[1]
    assert [said[2], said[3]] == [first, model.chat(conversation, 4)]
    assert said[4].startswith("There is no /hello") and said[5:] == ["A new conversation.", again, ""]


def test_chat_takes_examples(model, asked):
    picture = asked.parent / "0.png"
    typed = ["/example seven\n", f"/image {picture}\n", "/example Which digit? => seven\n", f"/image {picture}\n", "Which digit?\n"]
    out = io.StringIO()
    chat.talk(model, SETTINGS, typed, out)
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "Which digit?"}]
    conversation = [{"role": "user", "content": content}, {"role": "assistant", "content": "seven"}, {"role": "user", "content": content}]
    said = out.getvalue().split("\n")
    assert "a part of it is missing" in said[0] and said[2] == "An example with 1 pictures."
    assert said[4] == model.chat(conversation, 4)


@pytest.mark.parametrize("layout", ["hf", "peft"])
def test_an_export_comes_back(model, tmp_path, layout, capsys):
    recipe = dataclasses.replace(small_workdir.RECIPE, export=config.Export(format=layout))
    path = export.export(model, recipe, tmp_path)
    assert (
        path == tmp_path / "export" and (path / ("config.json" if layout == "hf" else "adapter_config.json")).exists()
    )
    assert json.loads((tmp_path / "results.json").read_text())["export_logit_difference"] < 1e-4
    assert "read back" in capsys.readouterr().out


def test_an_export_that_comes_back_different_is_refused(model, tmp_path, monkeypatch):
    spoilt = jax.tree.map(lambda leaf: leaf * 1.01, model.params)
    monkeypatch.setattr(export.mmjax, "load", lambda *_, **__: dataclasses.replace(model, params=spoilt))
    with pytest.raises(UserError, match="read back its logits differ"):
        export.export(model, small_workdir.RECIPE, tmp_path)


def test_evaluate_needs_something_to_evaluate(workdir):
    with pytest.raises(UserError, match="no evaluations"):
        evaluate.run(config.Recipe(), workdir)
