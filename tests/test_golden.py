"""The goldens that the package answers for, through the runner that everybody uses."""

import json

import numpy as np
import pytest

from tests import golden

GATED = (
    "mini_sqrelu_last_image_text_before_image",
    "open_flamingo_gelu_last_image",
    "open_flamingo_all_previous_images",
)
DIRECTORIES = [
    "llava/clip_mlp_two_rows",
    "llava_llama/mlp2x_gelu_right_padded",
    *(f"doubutsu/{name}" for name in ("base_two_rows", "next_three_tiles", "pooled_single_token_assembled")),
    *(f"moondream/{name}" for name in ("full_grid_wide_image_tiled", "small_grid_full_sequence")),
    *(f"moondream/{name}" for name in ("may2024_vision_single_and_tiled", "moondream1_residual_projection")),
    "vila/vila15_mlp_downsample_odd_grid_two_rows",
    *(f"label_mask/{name}" for name in ("v1", "plain", "llava_llama_2", "mpt", "v0_no_bos_tokenizer")),
    *(f"image_processor/{name}" for name in ("clip_shortest_edge_center_crop", "llava_pad_square", "siglip_squash")),
    *(f"image_processor/{name}" for name in ("blip_squash", "git_center_crop", "idefics", "internvl_dynamic_tiles")),
    *(f"image_processor/{name}" for name in ("llava_anyres_original", "llava_next_anyres")),
    "image_processor/qwen2_vl_smart_resize_patches",
    *(f"vila_projector/{name}" for name in ("linear", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix")),
    *(f"vila_projector/vila15_mlp_downsample_{grid}_grid" for grid in ("even", "odd")),
    "anymal_perceiver/two_layers",
    "flamingo_perceiver/mini_sqrelu_video_frames",
    "flamingo_perceiver/open_flamingo_gelu_two_images",
    "otter_perceiver/two_images_frames",
    *(f"flamingo_gated_xattn/{name}" for name in GATED),
    "otter_gated_xattn/last_image_text_before_image",
    *(f"openflamingo/{name}" for name in ("llama_every1_two_images", "mpt_every2_text_before_image")),
    "idefics/additional_vocab_vector_gates_resampler",
    "idefics/no_additional_vocab_float_gates_no_resampler_labels",
    *(f"anymal_linear/{name}" for name in ("linear1", "mlp2")),
    *(f"paligemma/{name}" for name in ("prefix_and_suffix", "prefix_only_generate")),
    *(f"git/{name}" for name in ("image_caption_right_padded", "video_six_frames_temporal_embedding")),
    "gemma3/sliding_and_full_one_image",
    "qwen2_vl/one_image_4x6",
    *(f"vision_zoo/{name}" for name in ("clip_vision", "siglip")),
    *(f"llm_zoo/{name}" for name in ("llama", "llama_llama3_rope", "mistral")),
]


@pytest.mark.parametrize("name", DIRECTORIES)
def test_golden(goldens, name):
    result = golden.run(goldens / name)
    assert result.status == "PASS" and result.compared == result.present, result


def test_rows_before_the_first_image_read_nothing(goldens):
    """There open_flamingo's mask of all previous images reads all images alike. The other rows agree."""
    directory = goldens / "flamingo_gated_xattn" / "open_flamingo_all_previous_images_leading_text_quirk"
    result = golden.run(directory)
    assert result.status == "FAIL" and "differs: attn_output_before_gate, output (recorded as a quirk" in result.why
    inputs, reference = (dict(np.load(directory / f"{name}.npz")) for name in ("inputs", "outputs"))
    config = json.loads((directory / "config.json").read_text())
    found = golden.PARTS["flamingo_gated_xattn"](directory, config, inputs, set(reference))
    before = np.cumsum(inputs["media_locations"], 1) == 0
    assert before.any() and not np.asarray(found["attn_output_before_gate"])[before].any()
    np.testing.assert_allclose(found["output"][~before], reference["output"][~before], rtol=1e-4, atol=1e-5)


def test_quirks_of_the_reference_are_not_targets(goldens):
    """There the clean rule holds: ids agree, labels do not, and the line says why."""
    result = golden.run(goldens / "label_mask" / "mpt_head_all_ignored_quirk")
    assert (
        result.status == "FAIL" and "differs: labels_0, labels_1, labels_2 (the reference says of itself:" in result.why
    )


def test_exit_code_and_lines(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "hovercraft"}')
    np.savez(tmp_path / "inputs.npz", x=np.zeros(1))
    np.savez(tmp_path / "outputs.npz", y=np.zeros(1))
    assert golden.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "  UNSUPPORTED  0/1  " in lines[0] and lines[-1] == "0 passed, 0 failed, 1 unsupported"
