"""Documents: mmc4 and obelics, what is shown of them and what is learned."""

import base64
import json
import pickle

import pytest

from mmjax.config import Source
from mmjax.data import interleaved, sources
from mmjax.data.images import BrokenImage
from mmjax.data.interleaved import Layout, Matching, obelics_pieces
from mmjax.data.messages import LEFT_OUT, BadSample
from mmjax.errors import UserError
from tests.data.pictures import encoded, gradient, write_tar


def mmc4(**extra):
    return {
        "text_list": ["One.", " Two. ", "Three, <image>.", "Four."],
        "image_info": [
            {"image_name": "a.png", "matched_text_index": 1, "matched_sim": 0.30},
            {"image_name": "b.png", "matched_text_index": 3, "matched_sim": 0.20},
        ],
        "similarity_matrix": [[0.1, 0.30, 0.29, 0.2], [0.1, 0.28, 0.1, 0.20]],
        **extra,
    }


def shown(messages):
    """A document as text: [images], text that is learned, (text that is not)."""
    (message,) = messages
    assert message["role"] == "assistant"
    return "".join(
        f"[{part['path']}]" if part["type"] == "image" else part["text"] if part.get("supervised", True) else f"({part['text']})"
        for part in message["content"]
    )


def written(row=None, matching=Matching(), **layout):
    return [shown(m) for m in Layout(**layout).messages(matching.pieces(row or mmc4(), "d", 0), "d")]


def test_images_stand_before_their_sentences_and_a_literal_mark_is_text():
    assert written() == ["One.[a.png]Two. Three, <IMAGE>.[b.png]Four."]
    assert written(place="after") == ["One. Two.[a.png]Three, <IMAGE>. Four."]
    assert written(place="first") == ["[a.png][b.png]One. Two. Three, <IMAGE>. Four."]


def test_policies_of_labels():
    assert written(labels="after_image") == ["(One.)[a.png]Two. Three, <IMAGE>.[b.png]Four."]
    assert written(labels="matched") == ["(One.)[a.png]Two.( Three, <IMAGE>.)[b.png]Four."]


def test_which_images_are_shown():
    assert written(max_images=1) == ["One.[a.png]Two. Three, <IMAGE>. Four."]
    assert written(matching=Matching(min_similarity=0.24)) == ["One.[a.png]Two. Three, <IMAGE>. Four."]
    # Done again, the first picture takes the third sentence, since only the second one fits the other.
    assert written(matching=Matching("assignment", 0.24)) == ["One.[b.png]Two.[a.png]Three, <IMAGE>. Four."]
    assert written(lead=0) == ["[a.png]Two. Three, <IMAGE>.[b.png]Four."]
    assert written(mmc4(text_list=["", "Two.", "", " "])) == ["[a.png]Two."]


def test_documents_that_the_recipe_leaves_out_are_no_faults():
    one = mmc4(image_info=mmc4()["image_info"][:1])
    for layout in ({"min_images": 3}, {"drop_single": 1.0, "max_images": 0}):
        with pytest.raises(BadSample, match=LEFT_OUT):
            written(one, **layout)
    with pytest.raises(BadSample, match=LEFT_OUT + "no text of it is supervised"):
        written(mmc4(image_info=[]), labels="after_image")
    kept = [interleaved._share(str(number), "drop_single") < 0.5 for number in range(400)]
    assert 160 < sum(kept) < 240 and interleaved._share("7", "a") == interleaved._share("7", "a")


def test_long_documents_become_several_samples():
    pieces = obelics_pieces({"images": [None, "a", None, "b", None], "texts": ["alpha beta", None, "gamma delta\nx", None, "e"]}, "d")
    parts = [shown(m) for m in Layout(window=11, joint="\n\n").messages(pieces, "d")]
    assert parts == ["alpha beta", "[a]gamma delta", "x[b]e"]
    assert [shown(m) for m in Layout(window=99, max_images=1).messages(pieces, "d")] == ["alpha beta[a]gamma delta\nx", "[b]e"]
    assert [shown(m) for m in Layout(window=4).messages(obelics_pieces({"images": [None], "texts": ["abcdefghij"]}, "d"), "d")] == [
        "abcd", "efgh", "ij",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (mmc4(text_list="One."), "text_list"),
        (mmc4(image_info=["a.png"]), "image_info"),
        (mmc4(image_info=[{"image_name": "a.png", "matched_text_index": 4}]), "sentence 4 of 4"),
        (mmc4(image_info=[{"matched_text_index": 1}]), "neither `image_name` nor `image_base64`"),
        (mmc4(similarity_matrix=[[1, 2]]), "not one of 2 images and 4 sentences"),
        (mmc4(similarity_matrix=None), "not one of 2 images"),
    ],
)
def test_a_broken_document_is_named(row, reason):
    with pytest.raises(BadSample, match=f"sample d: .*{reason}"):
        written(row, Matching("assignment" if "similarity" in reason or "not one of" in reason else "stored"))


def test_obelics_has_one_of_two_at_each_place():
    row = {"images": [None, "a", "b", None, None], "texts": ["x", None, None, "y", "z"]}
    assert [shown(m) for m in Layout(joint="\n\n", labels="matched").messages(obelics_pieces(row, "d"), "d")] == ["(x)[a][b]y(\n\nz)"]
    for broken in ({**row, "texts": ["x"] * 5}, {**row, "images": [None]}, {"images": [None], "texts": [None]}, {"texts": ["x"]}):
        with pytest.raises(BadSample, match="sample d"):
            obelics_pieces(broken, "d")


def test_text_may_belong_to_the_image_behind_it():
    row = {"images": ["a", None, "b", "c", None, None, "d"], "texts": [None, "x", None, None, "y", "z", None]}

    def written(share, labels="all"):
        return [shown(m) for m in Layout(next_image=share, labels=labels).messages(obelics_pieces(row, "d"), "d")]

    assert written(0.0) == ["[a]x[b][c]y z"]
    assert written(1.0) == ["[a][b][c]x y[d]z"] and written(1.0, "matched") == ["[a][b][c]x( y)[d]z"]


def test_a_source_of_documents(tmp_path):
    rows = [{**mmc4(), "id": "first"}, {"text_list": 3}, mmc4()]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tar = write_tar(tmp_path / "i.tar", {"a.png": encoded(gradient())})

    def opened(**options):
        return sources.open(Source(kind="mmc4", path=str(tmp_path / "d.jsonl"), images=str(tar), options=options))

    dataset = pickle.loads(pickle.dumps(opened(labels="after_image", matching="assignment")))
    assert len(dataset) == 3 and dataset[0].id == "first" and dataset[2].id == "d.jsonl:3"
    assert dataset.image("a.png").size == (24, 16)
    with pytest.raises(BadSample, match="d.jsonl:2"):
        dataset[1]
    parts = opened(window=8)
    assert [parts[i].id for i in (0, 1)] == ["first#0", "first#1"] and len(parts) > 5
    with pytest.raises(UserError, match="nearest: 'labels'"):
        opened(label="all")
    with pytest.raises(UserError, match="unknown labels 'some'"):
        opened(labels="some")


def test_pictures_within_the_documents(tmp_path):
    picture = base64.b64encode(encoded(gradient())).decode()
    info = [{"image_base64": picture, "matched_text_index": 0}, {"image_base64": "AAAA", "matched_text_index": 1}]
    document = json.dumps({"text_list": ["One.", "Two."], "image_info": info}).encode()
    tar = write_tar(tmp_path / "shard-0.tar", {"000.json": document, "001.json": b"{"})
    dataset = sources.open(Source(kind="mmc4", path=str(tmp_path / "shard-*.tar")))
    assert shown(dataset[0].messages) == "[row:0/0]One.[row:0/1]Two." and dataset[0].id == "000"
    assert dataset.image("row:0/0").size == (24, 16)
    with pytest.raises(BrokenImage):
        dataset.image("row:0/1")
    with pytest.raises(BadSample, match="001"):
        dataset[1]
    large = sources.open(Source(kind="mmc4", path=str(tar), options={"min_bytes": 50}))
    assert shown(large[0].messages) == "[row:0/0]One. Two."


def test_obelics_as_parquet(tmp_path):
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    for shard in range(2):
        rows = {
            "images": [[None, f"{shard}{number}.png"] for number in range(5)],
            "texts": [[f"text {number}", None] for number in range(5)],
        }
        parquet.write_table(pa.table(rows), tmp_path / f"{shard}.parquet", row_group_size=2)
    dataset = sources.open(Source(kind="obelics", path=str(tmp_path / "*.parquet")))
    assert len(dataset) == 10 and dataset[8].id == "1.parquet:4"
    for index in (9, 0, 4, 5):
        assert shown(dataset[index].messages) == f"text {index % 5}"
    before = sources.fingerprint(Source(kind="obelics", path=str(tmp_path / "*.parquet")))
    (tmp_path / "1.parquet").unlink()
    assert before != sources.fingerprint(Source(kind="obelics", path=str(tmp_path / "*.parquet")))


def test_recipes_as_they_come(data_kit):
    folder = data_kit / "interleaved"
    source = Source(kind="obelics", path=str(folder / "en_train.jsonl.gz"), images=str(folder / "images_en.tar"))
    dataset = sources.open(source)
    assert len(dataset) == 290
    with_pictures = 0
    for index in range(len(dataset)):
        paths = [part["path"] for part in dataset[index].messages[0]["content"] if part["type"] == "image"]
        with_pictures += bool(paths)
        if paths:
            assert dataset.image(paths[0]).mode == "RGB"
    assert 60 < with_pictures <= 95  # pictures at the end of a document are not shown
