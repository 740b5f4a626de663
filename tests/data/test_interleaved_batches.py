"""Documents and in-context rows on their way into batches: cut, packed, labelled, restarted."""

import json

import numpy as np
import pytest

from mmjax.config import Loader, Source, Stage
from mmjax.data import sources, templates
from mmjax.data.encoding import IGNORED, Encoder
from mmjax.data.images import ImageProcessor
from mmjax.data.interleaved import Layout, Matching
from mmjax.data.messages import LEFT_OUT, Sample
from mmjax.data.pipeline import Pipeline
from mmjax.errors import UserError
from tests.data.pictures import encoded, gradient, write_tar
from tests.data.tokenizers import marked_tokenizer

MEDIA = 4


@pytest.fixture(scope="module")
def tokenizer():
    return marked_tokenizer()


def encoder(tokenizer, template, **settings):
    return Encoder(tokenizer, templates.get(template, tokenizer), MEDIA, **settings)


def document(rng, number):
    """An mmc4 document: sentences of a few letters, pictures matched with some of them in order."""
    sentences = ["".join(rng.choice(list("abc d"), rng.integers(1, 12))) for _ in range(rng.integers(1, 7))]
    matched = sorted(rng.choice(len(sentences), rng.integers(0, len(sentences) + 1), replace=False).tolist())
    info = [{"image_name": "p.png", "matched_text_index": index, "matched_sim": 0.3} for index in matched]
    return {"id": f"d{number}", "text_list": sentences, "image_info": info}


def openflamingo_labels(ids, image, mark):
    """The published rule: no loss before the first image, on images, and behind an end of chunk until the next image."""
    labels = list(ids)
    open = False
    for place, id in enumerate(ids):
        if id == image:
            open, labels[place] = True, IGNORED
        elif not open:
            labels[place] = IGNORED
        elif id == mark:
            open = False
    return labels


def test_openflamingos_text_and_labels_on_random_documents(tokenizer):
    rng = np.random.default_rng(0)
    mark = tokenizer.convert_tokens_to_ids("<|endofchunk|>")
    encoding = encoder(tokenizer, "openflamingo")
    seen = 0
    for number in range(200):
        row = document(rng, number)
        pieces = Matching().pieces(row, "d", 0)
        shown = [piece for piece in pieces if piece.image is None and piece.matched]
        if not shown:
            continue
        seen += 1
        # The published text: a mark and <image> before each matched sentence, the first mark removed, spaces around both.
        with_image = {image["matched_text_index"] for image in row["image_info"]}
        sentences = [
            ("<|endofchunk|><image>" if index in with_image else "") + text.strip() for index, text in enumerate(row["text_list"]) if text.strip()
        ]
        text = " ".join(sentences).replace("<|endofchunk|>", "", 1).replace(" <|endofchunk|>", "<|endofchunk|>")
        text = text.replace(" <image>", "<image>") + "<|endofchunk|></s>"
        if any(not row["text_list"][index].strip() for index in with_image):
            continue  # a picture matched with nothing: the published text would leave an empty chunk
        (messages,) = Layout(labels="after_image").messages(pieces, "d")
        example = encoding.encode(Sample("d", messages))
        runs = [tokenizer(run, add_special_tokens=False)["input_ids"] for run in text.split("<image>")]
        ids = [id for number, run in enumerate(runs) for id in [*[-200] * (number > 0), *run]]
        keep = (example.media < 0) | (example.media % MEDIA == 0)  # one position for each image
        ours = np.where(example.media[keep] >= 0, -200, example.ids[keep])
        assert ours.tolist() == ids
        assert example.labels[keep].tolist() == openflamingo_labels(ids, -200, mark)
    assert seen > 100


def test_otters_labels_are_the_answers_with_their_marks(tokenizer):
    messages = []
    for number in range(3):
        messages += [
            {"role": "user", "content": [{"type": "image", "path": "p"}, {"type": "text", "text": f"Q{number}"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"A{number}"}]},
        ]
    example = encoder(tokenizer, "otter").encode(Sample("s", messages))
    text = tokenizer.decode(example.labels[example.labels != IGNORED])
    assert text == "A0<|endofchunk|>A1<|endofchunk|>A2<|endofchunk|></s>"


@pytest.mark.parametrize("limit", range(8, 60, 3))
def test_a_cut_document_has_whole_images_with_text_behind_them(tokenizer, limit):
    content = []
    for number in range(4):
        content += [{"type": "image", "path": f"{number}"}, {"type": "text", "text": "word word"}]
    whole = encoder(tokenizer, "interleaved").encode(Sample("d", [{"role": "assistant", "content": content}]))
    cut = encoder(tokenizer, "interleaved", max_length=limit).encode(Sample("d", [{"role": "assistant", "content": content}]))
    assert len(cut.ids) <= limit and cut.ids.tolist() == whole.ids[: len(cut.ids)].tolist()
    assert (cut.media >= 0).sum() == MEDIA * len(cut.images)
    last = int(np.flatnonzero(cut.media >= 0)[-1])
    assert (cut.labels[last + 1 :] != IGNORED).any()


def pipeline(folder, encoding, given, workdir=None, **stage):
    stage = Stage(**{"rows": 4, "length": 60, "tiles": 6, "epochs": 1, "sources": given, **stage})
    datasets = {name: sources.open(source) for name, source in given.items()}
    return Pipeline(stage, datasets, encoding, ImageProcessor(8, "squash"), seed=0, loader=Loader(), workdir=workdir)


def test_a_stage_of_documents_and_pairs(tmp_path, tokenizer):
    rng = np.random.default_rng(1)
    documents = [document(rng, number) for number in range(60)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, documents)))
    rows = [{"id": f"c{number}", "image": "p.png", "caption": "a cat"} for number in range(31)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tar = str(write_tar(tmp_path / "i.tar", {"p.png": encoded(gradient())}))
    options = {"drop_single": 0.5, "max_images": 3, "labels": "after_image"}
    given = {
        "documents": Source(kind="mmc4", path=str(tmp_path / "d.jsonl"), images=tar, options=options),
        "pairs": Source(kind="captions", path=str(tmp_path / "c.jsonl"), images=tar, join=3, loss_weight=0.25, options={"prompt": "Output:"}),
    }
    encoding = encoder(tokenizer, "openflamingo")
    loaded = pipeline(tmp_path, encoding, given, tmp_path)
    left_out = [item for item in loaded.skipped if item.reason.startswith(LEFT_OUT)]
    assert len(left_out) == len(loaded.skipped) > 10  # a large share, and no fault
    seen = list(loaded.batches())
    ids = {id for _, info in seen for row in info.ids for id in row}
    assert sum(id.startswith("c") for id in ids) == 10 and sum(id.startswith("d") for id in ids) == 60 - len(left_out)
    for batch, info in seen:
        weights = np.unique(batch.weights).tolist()
        assert set(weights) <= {0.0, 0.25, 1.0} and info.supervised == np.count_nonzero(batch.weights)
    (later, _), *_ = pipeline(tmp_path, encoding, given, tmp_path).batches(2)
    for name in ("tokens", "weights", "media", "images"):
        np.testing.assert_array_equal(getattr(later, name), getattr(seen[2][0], name))
    with pytest.raises(UserError, match="60 of 60 samples cannot be used: .*left out: it has"):
        pipeline(tmp_path, encoding, {"d": Source(kind="mmc4", path=str(tmp_path / "d.jsonl"), options={"min_images": 9})})


def test_recipes_fill_rows(data_kit, tokenizer):
    folder = data_kit / "interleaved"
    options = {"labels": "after_image", "max_images": 4, "lead": 1, "window": 400, "min_images": 1}
    given = {"recipes": Source(kind="obelics", path=str(folder / "en_train.jsonl.gz"), images=str(folder / "images_en.tar"), options=options)}
    loaded = pipeline(folder, encoder(tokenizer, "openflamingo"), given, length=600, rows=8)
    images = 0
    for batch, info in loaded.batches():
        images += info.images
        assert batch.images.shape[-3:] == (8, 8, 3) and info.supervised > 0
    assert images > 100
