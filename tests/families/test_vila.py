"""VILA's layouts: transformers' own tower and language model with VILA's projector between them, in folders as published."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.errors import UserError

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from transformers import (  # noqa: E402
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

IMAGE = -200
COMMON = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
}
# (tower, size of its pictures, projector, feature)
CASES = {
    "siglip, odd map": ("siglip", 42, "mlp_downsample", "cls_patch"),
    "clip, 3 x 3": ("clip", 56, "mlp_downsample_3x3_fix", "patch"),
}


class Downsample(torch.nn.Module):
    """Blocks of n x n patches become tokens, column by column or row by row; what is missing is 0."""

    def __init__(self, n: int, columns: bool):
        super().__init__()
        self.n, self.columns = n, columns

    def forward(self, x):
        side = round(x.shape[1] ** 0.5)
        more = -side % self.n
        x = torch.nn.functional.pad(x.view(len(x), side, side, -1), (0, 0, 0, more, 0, more))
        blocks = x.unfold(1, self.n, self.n).unfold(2, self.n, self.n).permute(0, 1, 2, 4, 5, 3).flatten(3)
        return (blocks.transpose(1, 2) if self.columns else blocks).flatten(1, 2)


class Projector(torch.nn.Module):
    def __init__(self, kind: str, width: int, out: int):
        super().__init__()
        nn = torch.nn
        if kind == "linear":
            self.layers = nn.Linear(width, out)
        elif kind == "mlp_downsample":
            self.layers = nn.Sequential(
                Downsample(2, True), nn.LayerNorm(4 * width), nn.Linear(4 * width, out), nn.GELU(), nn.Linear(out, out)
            )
        else:
            self.layers = nn.Sequential(
                Downsample(3, False),
                nn.LayerNorm(9 * width),
                nn.Linear(9 * width, 3 * width),
                nn.GELU(),
                nn.LayerNorm(3 * width),
                nn.Linear(3 * width, out),
                nn.GELU(),
                nn.Linear(out, out),
            )

    def forward(self, x):
        return self.layers(x)


def drawn(module):
    for name, parameter in module.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean, 0.1 if mean else 0.2)
    return module.eval()


class Reference:
    """The three parts, and the answer of the whole for one row."""

    def __init__(self, tower: str, size: int, kind: str, select: str):
        torch.manual_seed(0)
        config = (CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(**COMMON, image_size=size)
        self.tower = drawn((CLIPVisionModel if tower == "clip" else SiglipVisionModel)(config))
        self.llm = drawn(
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=90,
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    rms_norm_eps=1e-5,
                )
            )
        )
        self.projector = drawn(Projector(kind, 24, 32))
        self.size, self.kind, self.select = size, kind, select

    def save(self, path, **fields) -> None:
        parts = {"llm": self.llm, "vision_tower": self.tower}
        config = {"model_type": "llava_llama", "architectures": ["LlavaLlamaModel"]}
        for name, part in parts.items():
            part.save_pretrained(path / name)
            config[f"{name}_cfg"] = json.loads((path / name / "config.json").read_text())
        (path / "mm_projector").mkdir()
        safetensors_torch.save_file(self.projector.state_dict(), path / "mm_projector" / "model.safetensors")
        config |= {
            "mm_projector_cfg": {"mm_projector_type": self.kind, "model_type": "v2l_projector"},
            "hidden_size": 32,
            "mm_hidden_size": 24,
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": self.select,
            "image_aspect_ratio": "resize",
            "s2": False,
            **fields,
        }
        (path / "config.json").write_text(json.dumps(config))

    @torch.no_grad()
    def embeddings(self, ids, images):
        """One row [length, width] with the images' tokens at their places."""
        pieces, used = [], 0
        for token in ids:
            if token != IMAGE:
                pieces.append(self.llm.get_input_embeddings()(torch.tensor([token])))
                continue
            states = self.tower(torch.tensor(images[used : used + 1]), output_hidden_states=True).hidden_states[-2]
            pieces.append(self.projector(states if self.select == "cls_patch" else states[:, 1:])[0])
            used += 1
        return torch.cat(pieces)[None]

    @torch.no_grad()
    def logits(self, ids, images):
        return self.llm(inputs_embeds=self.embeddings(ids, images)).logits[0].numpy()

    @torch.no_grad()
    def greedy(self, ids, images, new: int):
        x = self.embeddings(ids, images)
        return self.llm.generate(inputs_embeds=x, max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    """(the reference, its directory, ours read from it)."""
    reference = Reference(*CASES[request.param])
    directory = tmp_path_factory.mktemp("vila")
    reference.save(directory)
    return reference, directory, mmjax.load(directory)


# Text before an image, no image, two of them.
ROWS = ([1, 5, 6, IMAGE, 7, 8], [1, 12, 13], [IMAGE, 9, IMAGE, 10, 11])


def inputs(size: int):
    ids = np.zeros((3, 6), int)
    mask = np.zeros((3, 6), int)
    for row, (line, seen) in zip(ROWS, zip(ids, mask)):
        line[: len(row)], seen[: len(row)] = row, 1
    images = np.random.default_rng(1).standard_normal((3, 3, size, size)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": mask, "images": images}


def test_logits_and_greedy_ids_equal_the_reference_row_by_row(pair):
    reference, _, ours = pair
    given = inputs(reference.size)
    found = ours(given)
    new = ours.generate(given, max_new_tokens=12, ignore_eos=True)
    used = 0
    for r, row in enumerate(ROWS):
        images = given["images"][used : used + row.count(IMAGE)]
        used += row.count(IMAGE)
        logits = reference.logits(row, images)
        assert int(found["spliced_attention_mask"][r].sum()) == len(logits)
        assert np.abs(np.asarray(found["logits"])[r, : len(logits)] - logits).max() < 2e-4
        assert new[r].tolist() == reference.greedy(row, images, 12)[0].tolist()


def test_a_row_without_images_may_bring_one_that_it_does_not_use(pair):
    reference, _, ours = pair
    given = inputs(reference.size)
    more = {**given, "images": np.insert(given["images"], 1, 3.0, 0)}
    one, other = ours(given), ours(more)
    real = np.asarray(one["spliced_attention_mask"]) == 1
    np.testing.assert_allclose(np.asarray(one["logits"])[real], np.asarray(other["logits"])[real], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="ask for 3 images.*or 4, with one for each row.*but 2 are given"):
        ours({**given, "images": given["images"][:2]})


def test_folders_are_written_as_they_were_read(pair, tmp_path):
    reference, directory, ours = pair
    ours.save_pretrained(tmp_path)
    for folder in ("llm", "vision_tower", "mm_projector"):
        one, other = (
            safetensors_torch.load_file(place / folder / "model.safetensors") for place in (directory, tmp_path)
        )
        flat = {name.replace("vision_model.", ""): value for name, value in one.items()}
        found = {name.replace("vision_model.", ""): value for name, value in other.items()}
        assert flat.keys() == found.keys()
        assert all(torch.equal(flat[name], found[name]) for name in flat)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "llm").eval()
    tower = type(reference.tower).from_pretrained(tmp_path / "vision_tower").eval()
    for part, theirs in ((again, reference.llm), (tower, reference.tower)):
        state = part.state_dict()
        assert all(torch.equal(state[name], value) for name, value in theirs.state_dict().items())
    same = tree.flatten(mmjax.load(tmp_path).params)
    assert all(np.array_equal(same[path], leaf) for path, leaf in tree.flatten(ours.params).items())


def test_code_of_another_time_hands_out_the_tokens_in_another_order(tmp_path):
    reference = Reference(*CASES["siglip, odd map"])
    for source in ("vila15", "nvila"):
        (tmp_path / source).mkdir()
        reference.save(tmp_path / source, projector_source=source)
    columns, rows = (mmjax.load(tmp_path / source) for source in ("vila15", "nvila"))
    assert (columns.config.connector.token_order, rows.config.connector.token_order) == ("columns", "rows")
    images = inputs(42)["images"]
    given = {"input_ids": np.array([[1, IMAGE, 4]]), "images": images[:1]}
    one, other = (np.asarray(model(given)["connector_output"])[0].reshape(2, 2, -1) for model in (columns, rows))
    np.testing.assert_allclose(one, other.transpose(1, 0, 2), atol=1e-5)


def test_a_picture_at_two_scales_is_joined_on_channels(tmp_path):
    """VILA-1.5-3B-S2's connector: of twice the width, for as many tokens, over the maps of the picture and of its four quarters."""
    reference = Reference(*CASES["siglip, odd map"])
    reference.projector = drawn(Projector("mlp_downsample", 48, 32))
    (tmp_path / "theirs").mkdir()
    reference.save(tmp_path / "theirs", s2=True, s2_scales="42,84", mm_hidden_size=48)
    ours = mmjax.load(tmp_path / "theirs")
    picture = torch.tensor(np.random.default_rng(2).standard_normal((1, 3, 84, 84)).astype(np.float32))
    small = torch.nn.functional.interpolate(picture, (42, 42), mode="bicubic", align_corners=False)
    with torch.no_grad():

        def maps(x):
            return reference.tower(x, output_hidden_states=True).hidden_states[-2].view(len(x), 3, 3, -1)

        quarters = maps(torch.cat([picture[..., i : i + 42, j : j + 42] for i in (0, 42) for j in (0, 42)]))
        whole = quarters.view(2, 2, 3, 3, -1).transpose(1, 2).reshape(6, 6, -1)
        joined = torch.cat([maps(small)[0], whole.view(3, 2, 3, 2, -1).mean((1, 3))], -1).view(1, 9, 48)
        tokens = reference.projector(joined).numpy()
    found = ours({"input_ids": np.array([[1, IMAGE, 4]]), "images": picture.numpy()})
    np.testing.assert_allclose(found["connector_output"], tokens, atol=2e-4)
    ours.save_pretrained(tmp_path / "ours")
    assert mmjax.load(tmp_path / "ours").config == ours.config


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"s2": True, "s2_scales": "42,70", "mm_hidden_size": 48}, "s2_scales = .42, 70. are not multiples"),
        ({"mm_vision_select_feature": "patch"}, "a patch would be lost"),
        ({"mm_projector_cfg": {"mm_projector_type": "resampler"}}, "mm_projector_type = 'resampler'"),
        ({"mm_hidden_size": 7}, "mm_hidden_size is 7"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, fields, named):
    Reference(*CASES["siglip, odd map"]).save(tmp_path, **fields)
    with pytest.raises(UserError, match=named):
        mmjax.load(tmp_path)
