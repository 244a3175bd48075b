"""GGUF files become model folders once; files that are not what they seem are refused in one line."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch

from chai import gguf_files
from chai.gguf_files import GgufError, convert
from chai.loading import ModelError, ModelSource, load_config, load_model, load_tokenizer
from tests.chai.gguf_models import small_model, write_gguf


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "chai-attention" / "gguf"


@pytest.mark.parametrize(("kind", "dtype", "tolerance"), [
    ("F32", torch.float32, 0.0), ("F16", torch.float16, 1e-3), ("Q8_0", torch.bfloat16, 0.02),
])  # fmt: skip
def test_the_folder_holds_the_weights_of_the_file(cache, tmp_path, kind, dtype, tolerance):
    model = small_model()
    path = write_gguf(model, tmp_path / "small.gguf", kind)
    folder = convert(path)
    assert folder.parent == cache
    loaded = load_model(ModelSource("small", gguf=str(path), device="cpu"))
    assert loaded.dtype == dtype and loaded.config.num_key_value_heads == 2
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, weight in loaded.state_dict().items():
        scale = expected[name].abs().max()
        assert (weight.float() - expected[name]).abs().max() <= tolerance * scale, name
    assert load_tokenizer(ModelSource("small", gguf=str(path)))("abcd").input_ids[-1] == 13


def test_a_file_is_converted_once_and_a_damaged_folder_again(cache, tmp_path):
    path = write_gguf(small_model(), tmp_path / "small.gguf")
    folder = convert(path)
    weights = folder / gguf_files.WEIGHTS
    before = weights.stat().st_mtime_ns
    copied = shutil.copy(path, tmp_path / "copy.gguf")  # the content counts, not the name
    assert convert(copied) == folder and weights.stat().st_mtime_ns == before
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert convert(path) == folder and weights.read_bytes() != bytes(content)
    assert [entry.name for entry in cache.iterdir() if entry.is_dir()] == [folder.name]
    other = write_gguf(small_model(seed=1), tmp_path / "other.gguf")
    assert convert(other) != folder


def test_a_killed_conversion_leaves_nothing_that_is_used(cache, tmp_path):
    path = write_gguf(small_model(), tmp_path / "small.gguf")
    code = (
        "import sys, time; from pathlib import Path; from chai import gguf_files\n"
        "gguf_files.file_digest = lambda p, real=gguf_files.file_digest: "
        "(print('here', flush=True), time.sleep(60)) if Path(p).name == gguf_files.WEIGHTS else real(p)\n"
        "gguf_files.convert(Path(sys.argv[1]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    assert child.stdout is not None and child.stdout.readline() == b"here\n"
    child.kill()
    child.wait()
    began = time.monotonic()
    assert gguf_files.is_complete(convert(path))
    assert time.monotonic() - began < 50  # the lock of the dead process does not hold
    assert len([entry for entry in cache.iterdir() if entry.is_dir()]) == 1


def test_wrong_files_are_refused_in_one_line(cache, tmp_path, monkeypatch):
    whole = write_gguf(small_model(), tmp_path / "small.gguf").read_bytes()
    cases = {
        "text.gguf": (b"not a model", "text.gguf is not a GGUF file: it begins with b'not '"),
        "cut.gguf": (whole[: len(whole) // 2], "cut.gguf is truncated or damaged"),
        "head.gguf": (whole[:40], "head.gguf is truncated or damaged"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError) as raised:
            load_model(ModelSource("small", gguf=str(tmp_path / name)))
        assert message in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(GgufError, match="cannot read the GGUF file .*missing.gguf: No such file"):
        convert(tmp_path / "missing.gguf")
    unknown = write_gguf(small_model(), tmp_path / "unknown.gguf", architecture="rwkv9")
    with pytest.raises(GgufError, match="transformers cannot read the GGUF file .*rwkv9"):
        convert(unknown)
    assert not cache.exists() or not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_a_missing_package_and_a_full_disk_are_named(cache, tmp_path, monkeypatch):
    path = write_gguf(small_model(), tmp_path / "small.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(GgufError, match=r"takes 0\.\d\d MB; .* has 0\.00 MB free \(set XDG_CACHE_HOME"):
        convert(path)
    monkeypatch.undo()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(GgufError, match="needs the package gguf, which is not installed") as raised:
        convert(path)
    assert raised.value.remedy == "gguf"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writes beyond a size in bytes fail, as on a full disk; the output of a test is a file, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [100_000, 16])  # bytes: less than the weights, and less than any file
@pytest.mark.parametrize("load", [load_config, load_model, load_tokenizer])
def test_a_disk_that_fills_while_weights_are_written_is_named(cache, tmp_path, load, limit):
    source = ModelSource("small", gguf=str(write_gguf(small_model(), tmp_path / "small.gguf")), device="cpu")
    with pytest.raises(ModelError) as raised, largest_file(limit):
        load(source)
    assert re.fullmatch(
        rf"the converted model of small.gguf takes 0.\d\d MB; writing to {cache} failed: .*File too large.* "
        r"\(set XDG_CACHE_HOME to a folder with enough space\)",
        str(raised.value),
    )
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_a_file_is_hashed_again_only_if_it_changed(cache, tmp_path, monkeypatch):
    source = ModelSource("small", gguf=str(write_gguf(small_model(), tmp_path / "small.gguf")), device="cpu")
    load_model(source)
    read, real = [], hashlib.sha256
    monkeypatch.setattr(gguf_files.hashlib, "sha256", lambda: read.append(1) or real())
    for load in (load_config, load_model, load_tokenizer):
        load(source)
    assert not read
    folder = convert(tmp_path / "small.gguf")
    other = write_gguf(small_model(seed=1), tmp_path / "small.gguf")  # of the same size
    assert convert(other) != folder and read


def test_an_unwritable_cache_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(GgufError, match="cannot write the converted model of small.gguf to .*: Not a directory"):
        convert(write_gguf(small_model(), tmp_path / "small.gguf"))


def test_the_record_names_the_file(cache, tmp_path):
    folder = convert(write_gguf(small_model(), tmp_path / "small.gguf", "Q8_0"))
    record = json.loads((folder / gguf_files.RECORD).read_text())
    assert record["file"] == "small.gguf" and record["dtype"] == "bfloat16"
    assert record["weights_sha256"] == gguf_files.file_digest(folder / gguf_files.WEIGHTS)
