import gzip
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmjax.data.images import BrokenImage
from mmjax.data.stores import open_store
from mmjax.errors import UserError
from tests.data.pictures import write_tar


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    (root / "deep/a.png").write_bytes(b"inside")
    (tmp_path / "secret.png").write_bytes(b"outside")
    (tmp_path / "images-too").mkdir()
    (tmp_path / "images-too/b.png").write_bytes(b"beside")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "out").symlink_to(tmp_path)
    (root / "in.png").symlink_to(root / "deep/a.png")
    (root / "loop").symlink_to(root / "loop")
    return root


def test_a_folder_is_read(folder):
    store = open_store(str(folder))
    assert store.read("deep/a.png") == store.read("./deep/../deep/a.png") == store.read("in.png") == b"inside"
    assert pickle.loads(pickle.dumps(store)).read("deep/a.png") == b"inside"


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "deep/../../secret.png", "../images-too/b.png", "link.png", "out/secret.png", "/etc/passwd",
     "loop", "deep", "", ".", "nul\0byte", "x" * 5000, "missing.png"],
)  # fmt: skip
def test_what_leads_out_or_nowhere_is_refused(folder, name):
    with pytest.raises(BrokenImage) as caught:
        open_store(str(folder)).read(name)
    assert len(str(caught.value)) < 200


def test_a_named_pipe_does_not_block(folder):
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(BrokenImage, match="no such file"):
        open_store(str(folder)).read("pipe.png")


def test_tars_are_read_by_offset_from_many_threads(tmp_path):
    files = {
        f"{'long/' * 30 if number % 50 == 0 else ''}{number}.bin": bytes([number % 256]) * number
        for number in range(400)
    }
    names = list(files)
    write_tar(tmp_path / "part-0.tar", {name: files[name] for name in names[:200]})
    write_tar(tmp_path / "part-1.tar", {f"./{name}": files[name] for name in names[200:]})
    store = open_store(str(tmp_path / "part-*.tar"))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(store.read, names * 3)) == list(files.values()) * 3
    assert pickle.loads(pickle.dumps(store)).read("399.bin") == files["399.bin"]
    assert sorted(os.listdir(tmp_path)) == ["part-0.tar", "part-1.tar"]
    with pytest.raises(BrokenImage, match="no such file in part-0.tar, part-1.tar"):
        store.read("../399.bin")


def test_links_in_a_tar_are_not_followed(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(BrokenImage):
        open_store(str(tmp_path / "a.tar")).read("passwd.png")


def test_a_missing_or_compressed_store_is_refused(tmp_path):
    for spec in (tmp_path / "nowhere", tmp_path / "nowhere-*.tar"):
        with pytest.raises(UserError, match="nowhere"):
            open_store(str(spec))
    packed = tmp_path / "a.tar"
    packed.write_bytes(gzip.compress(b"x" * 4096))
    with pytest.raises(UserError, match="uncompressed tar"):
        open_store(str(packed))


def test_without_images_the_config_key_is_named():
    with pytest.raises(BrokenImage, match="`images`"):
        open_store("").read("a.png")
