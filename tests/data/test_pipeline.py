import dataclasses
import functools
import json

import numpy as np
import pytest
from PIL import Image

from mmjax.config import Loader, Source, Stage
from mmjax.data import images, instructions, lengths, sources, templates
from mmjax.data.encoding import Encoder
from mmjax.data.images import ImageProcessor
from mmjax.data.instructions import Embeddings
from mmjax.data.pipeline import Pipeline
from mmjax.errors import UserError
from tests.data.pictures import claimed_png, encoded, gradient, write_tar
from tests.data.tokenizers import byte_tokenizer

PROCESSOR = ImageProcessor(8, "squash")
BROKEN = {0: encoded(gradient(60, 60))[:100], 1: None, 2: b"no picture", 3: claimed_png(16000, 16000)}


def write_mixture(folder, count, broken_every=0):
    """`count` messages with no, one or two images; of the pictures of every `broken_every`th sample the last is broken.

    Returns the ids of the broken samples. The red of a picture is the number of its sample."""
    rows, files, broken = [], {}, set()
    for number in range(count):
        names = [f"{number}-{which}.png" for which in range(number % 3)]
        if broken_every and number % broken_every == 1:
            names = names or [f"{number}-0.png"]
            broken.add(f"s{number}")
        colour = (number % 256, number // 256, 0)
        files |= {name: solid(colour) for name in names}
        if f"s{number}" in broken:
            data = BROKEN[number // broken_every % len(BROKEN)]
            files.pop(names[-1])
            if data is not None:
                files[names[-1]] = data
        question = "<image>" * len(names) + f"What is number {number}?"
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"It is {'x' * (number % 23)}."},
        ]
        rows.append({"id": f"s{number}", "messages": turns, "images": names})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_tar(folder / "images.tar", files)
    return broken


@functools.cache
def solid(colour):
    return encoded(Image.new("RGB", (6, 6), colour), "BMP")


@pytest.fixture(scope="module")
def encoder():
    tokenizer = byte_tokenizer()
    return Encoder(tokenizer, templates.get("mistral_instruct", tokenizer), tokens_per_image=4)


def pipeline(folder, encoder, *, loader=Loader(), sources_=None, shards=1, own=None, seed=0, workdir=None, features=None,
             processor=PROCESSOR, **stage):  # fmt: skip
    given = sources_ or {
        "mixed": Source(kind="messages", path=str(folder / "data.jsonl"), images=str(folder / "images.tar"))
    }
    stage = Stage(**{"rows": 8, "length": 160, "tiles": 4, "epochs": 1, "sources": given, **stage})
    datasets = {name: sources.open(source) for name, source in given.items()}
    return Pipeline(stage, datasets, encoder, processor, seed=seed, loader=loader, shards=shards, own=own, features=features,
                    workdir=workdir)  # fmt: skip


def assert_same(some, others):
    some, others = list(some), list(others)
    assert len(some) == len(others) > 0
    for (batch, info), (other, other_info) in zip(some, others):
        assert dataclasses.replace(info, step=0) == dataclasses.replace(other_info, step=0)
        for field in dataclasses.fields(batch):
            np.testing.assert_array_equal(getattr(batch, field.name), getattr(other, field.name))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    write_mixture(folder, 120)
    return folder


def test_ten_thousand_samples_with_one_percent_broken(tmp_path, encoder):
    broken = write_mixture(tmp_path, 10_000, broken_every=100)
    assert len(broken) == 100
    loaded = pipeline(tmp_path, encoder, rows=64, length=512, tiles=8, loader=Loader(threads=2, max_broken=0.02))
    seen, tokens, room = [], 0, 0
    for batch, info in loaded.batches():
        seen += [id for row in info.ids for id in row]
        tokens += info.tokens
        room += batch.tokens.size
        assert info.tokens == (batch.segments > 0).sum() and info.images == batch.tiles.sum()
        assert info.padding == pytest.approx(1 - info.tokens / batch.tokens.size)
        media = batch.media[batch.media >= 0]
        assert len(media) == 4 * info.images and batch.tiles[0][media // 4].all()
    reported = [skipped.id for skipped in loaded.skipped]
    assert sorted(reported) == sorted(broken)
    assert {skipped.source for skipped in loaded.skipped} == {"mixed"} and all(item.reason for item in loaded.skipped)
    epoch = {f"s{number}" for number in range(10_000)} - broken
    assert set(seen) == epoch
    # the last step is filled up from the next epoch
    assert len(seen) - len(epoch) < 64 * 8
    assert tokens / room > 0.9


def test_too_many_broken_samples_stop_the_run(tmp_path, encoder):
    write_mixture(tmp_path, 200, broken_every=20)
    with pytest.raises(UserError, match=r"samples could not be loaded, more than loader.max_broken = 0.02.*mixed/s"):
        list(pipeline(tmp_path, encoder, loader=Loader(max_broken=0.02)).batches())
    assert list(pipeline(tmp_path, encoder, loader=Loader(max_broken=0.2)).batches())


def test_a_broken_sample_loses_its_loss_and_its_tiles_but_not_its_row(tmp_path, encoder):
    write_mixture(tmp_path, 40)
    whole = list(pipeline(tmp_path, encoder, packing=False).batches())
    (tmp_path / "broken").mkdir()
    write_mixture(tmp_path / "broken", 40, broken_every=10)
    steps = list(pipeline(tmp_path / "broken", encoder, packing=False, loader=Loader(max_broken=1)).batches())
    compared = 0
    for (batch, info), (other, other_info) in zip(whole, steps):
        for row, (ids, other_ids) in enumerate(zip(info.ids, other_info.ids)):
            if ids == other_ids:
                np.testing.assert_array_equal(batch.targets[row], other.targets[row])
                compared += 1
            else:
                assert not other_ids and not other.weights[row].any() and (other.media[row] == -1).all()
    assert compared == 40 - 4


def test_a_restart_goes_on_where_the_run_stopped(small, encoder, tmp_path):
    for options in ({"augment": ("flip",)}, {"packing": False}):
        through = list(pipeline(small, encoder, steps=20, epochs=0, **options).batches())
        assert through[-1][1].epoch > 1
        for step in (1, 7, 19):
            resumed = pipeline(small, encoder, steps=20, epochs=0, workdir=tmp_path, **options)
            assert_same(through[step:], resumed.batches(step))
    assert list(pipeline(small, encoder, steps=20).batches(20)) == []


def test_worker_processes_measure_and_load_the_same(small, encoder, monkeypatch):
    here = list(pipeline(small, encoder).batches())
    monkeypatch.setattr(lengths, "CHUNK", 50)
    assert_same(here, pipeline(small, encoder, loader=Loader(workers=2)).batches())


def test_four_processes_hold_the_rows_of_one(small, encoder):
    one = list(pipeline(small, encoder, shards=4, accumulate=2, steps=6).batches())
    for own in ((0,), (1,), (2, 3), (0, 3)):  # where another axis goes over processes, some have the same shards
        rows = [2 * shard + i for shard in own for i in range(2)]
        for (batch, info), (other, other_info) in zip(one, pipeline(small, encoder, shards=4, own=own, accumulate=2, steps=6).batches()):
            assert [info.ids[row] for row in rows] == list(other_info.ids) and other_info.share == len(own) / 4
            for field in ("tokens", "segments", "positions", "media", "targets", "weights", "images", "tiles"):
                np.testing.assert_array_equal(getattr(batch, field)[rows], getattr(other, field))


def test_a_rows_media_lie_in_its_own_group(small, encoder):
    for batch, info in pipeline(small, encoder, shards=4).batches():
        assert batch.images.shape == (4, 8, 8, 8, 3)
        for row, ids in enumerate(info.ids):
            group = row // 2
            for number, id in enumerate(ids, 1):
                media = batch.media[row][batch.segments[row] == number]
                for tile in np.unique(media[media >= 0] // 4):
                    assert batch.tiles[group, tile]
                    assert (batch.images[group, tile] == [int(id[1:]) % 256, 0, 0]).all()


def test_packed_tokens_are_the_unpacked_ones(small, encoder):
    def samples(**options):
        found = {}
        for batch, info in pipeline(small, encoder, steps=15, epochs=0, **options).batches():
            for row, ids in enumerate(info.ids):
                for number, id in enumerate(ids, 1):
                    here = batch.segments[row] == number
                    fields = (batch.tokens, batch.positions, batch.targets, batch.weights, batch.media >= 0)
                    found[id] = [field[row][here].tolist() for field in fields]
        return found

    packed, unpacked = samples(), samples(packing=False)
    assert len(packed) == len(unpacked) == 120
    assert packed == unpacked
    assert all(positions == list(range(len(positions))) for _, positions, *_ in packed.values())


def test_unusable_samples_are_dropped_by_id_and_too_many_refused(tmp_path, encoder):
    write_mixture(tmp_path, 30)
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    rows[4]["images"] = ["one-too-many.png"] * 3
    rows[9]["messages"] = rows[9]["messages"][:1]
    rows[11]["messages"][0]["content"] += "<image>" * 3
    rows[11]["images"] += ["s.png"] * 3
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = pipeline(tmp_path, encoder, loader=Loader(max_broken=0.1))
    why = {skipped.id: skipped.reason for skipped in loaded.skipped}
    assert set(why) == {"s4", "s9", "s11"}
    assert "placeholders" in why["s4"] and "nothing in it is supervised" in why["s9"] and "a row holds 4" in why["s11"]
    assert not {id for _, info in loaded.batches() for row in info.ids for id in row} & set(why)
    with pytest.raises(UserError, match="3 of 30 samples cannot be used: mixed/s4"):
        pipeline(tmp_path, encoder)


def test_the_table_of_lengths_is_kept_and_knows_what_it_was_made_from(small, encoder, tmp_path, monkeypatch):
    pipeline(small, encoder, workdir=tmp_path)
    (stored,) = (tmp_path / "lengths").iterdir()
    measured = []
    original = lengths._measure
    monkeypatch.setattr(lengths, "_measure", lambda *given: measured.append(1) or original(*given))
    pipeline(small, encoder, workdir=tmp_path)
    assert not measured
    pipeline(small, dataclasses.replace(encoder, tokens_per_image=5), workdir=tmp_path)
    assert len(measured) == 1 and len(list((tmp_path / "lengths").iterdir())) == 2
    stored.write_bytes(stored.read_bytes()[:100])
    pipeline(small, encoder, workdir=tmp_path)
    assert len(measured) == 2


def test_flips_are_drawn_anew_each_epoch_and_the_same_again(tmp_path, encoder):
    files = {"0.png": encoded(gradient(8, 8))}
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "x"}]
    rows = [{"id": str(number), "messages": turns, "images": ["0.png"]} for number in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_tar(tmp_path / "images.tar", files)
    options = {"packing": False, "steps": 8, "augment": ("flip",), "tiles": 1}
    upright = PROCESSOR.pixels(gradient(8, 8))
    flipped = {}
    for batch, info in pipeline(tmp_path, encoder, **options).batches():
        for (id,), image in zip(info.ids, batch.images[0]):
            assert (image == upright).all() or (image == upright[:, ::-1]).all()
            flipped.setdefault(id, []).append((image != upright).any())
    share = np.mean(list(flipped.values()))
    assert 0.3 < share < 0.7 and all(len(set(draws)) == 2 for draws in flipped.values())


def test_classes_of_handwriting():
    source = Source(kind="digits", options={"task": "single", "size": 20})
    loaded = pipeline(None, None, sources_={"d": source}, objective="classify", rows=4, tiles=2, shards=2)
    assert loaded.steps == 3
    for batch, info in loaded.batches():
        assert batch.tokens is None and batch.images.shape == (2, 4, 8, 8, 3)
        answers = [loaded.datasets["d"][int(id.rpartition("-")[2])].answers[0] for row in info.ids for id in row]
        assert batch.classes[batch.tiles].tolist() == list(map(int, answers))
        assert (batch.classes[~batch.tiles] == -1).all()


def test_text_alone_needs_no_images(encoder):
    source = Source(kind="digit_facts", options={"size": 20})
    loaded = pipeline(None, encoder, sources_={"facts": source}, processor=None)
    batch, info = next(iter(loaded.batches()))
    assert batch.images is None and batch.tiles is None and info.supervised == batch.weights.sum() > 0


def test_cached_features_take_the_place_of_pictures(small, encoder):
    class Cache:
        shape, dtype = (4, 5), np.float16

        def lookup(self, dataset, image, flipped=False):
            assert dataset == "mixed" and flipped is False
            return np.full((1, *self.shape), int(image.partition("-")[0]), np.float16)

    for batch, info in pipeline(small, encoder, processor=None, features=Cache()).batches():
        assert batch.images is None and batch.features.dtype == np.float16
        shown = [int(id[1:]) for row in info.ids for id in row for _ in range(int(id[1:]) % 3)]
        assert batch.features[0, batch.tiles[0], 0, 0].tolist() == shown


def test_a_share_without_samples_has_the_fields_of_the_others(encoder, monkeypatch):
    """Of several processes that run one program, one may have nothing but broken samples in a step."""
    source = Source(kind="drawn_hypotheses", options={"size": 16, "embeddings": 3, "width": 5, "audio": 7})
    settings = dict(sources_={"heard": source}, packing=False, noise_distillation=0.5, loader=Loader(max_broken=1), tiles=1, length=512)
    made = pipeline(None, dataclasses.replace(encoder, media_apart=True), processor=Embeddings((3, 5)), **settings)
    whole, _ = next(iter(made.batches()))
    monkeypatch.setattr(instructions.DrawnHypotheses, "image", lambda *_: (_ for _ in ()).throw(images.BrokenImage("cut off")))
    empty, info = next(iter(made.batches()))
    assert len(info.skipped) == 8 and whole.audio.any() and not empty.audio.any()
    kinds = [{f.name: getattr(getattr(batch, f.name), "dtype", None) for f in dataclasses.fields(batch)} for batch in (whole, empty)]
    shapes = [{f.name: np.shape(getattr(batch, f.name)) for f in dataclasses.fields(batch)} for batch in (whole, empty)]
    assert kinds[0] == kinds[1] and shapes[0] == shapes[1]


def test_weights_choose_the_mixture(small, encoder):
    text = Source(kind="digit_facts", options={"size": 50}, weight=3.0)
    mixed = Source(kind="messages", path=str(small / "data.jsonl"), images=str(small / "images.tar"), weight=1.0)
    loaded = pipeline(small, encoder, sources_={"mixed": mixed, "text": text}, length=256)
    ids = [id for _, info in loaded.batches() for row in info.ids for id in row]
    assert 0.2 < sum(id.startswith("s") for id in ids) / len(ids) < 0.3


def test_what_cannot_be_shared_out_is_refused(small, encoder):
    for options in ({"shards": 3}, {"shards": 4, "accumulate": 4}, {"shards": 16}):
        with pytest.raises(UserError, match="must be a multiple"):
            pipeline(small, encoder, **options)
    with pytest.raises(UserError, match="the sources mixed have images, but the model has no vision encoder"):
        pipeline(small, encoder, processor=None)
    with pytest.raises(UserError, match="'turn'"):
        pipeline(small, encoder, augment=("turn",))


def test_real_photographs(data_kit, encoder):
    folder = data_kit / "flickr8k"
    source = Source(path=str(folder / "llava_train.json.gz"), images=str(folder / "images_train-*.tar"), limit=200)
    loaded = pipeline(
        None, encoder, sources_={"flickr8k": source}, length=256, tiles=2, processor=ImageProcessor(32, "pad")
    )
    batches = list(loaded.batches())
    assert not loaded.skipped and sum(info.samples for _, info in batches) >= 200
    assert all(batch.images[0][batch.tiles[0]].std() > 30 for batch, _ in batches)
