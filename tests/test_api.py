"""The Python interface of the README: the same objects the commands use."""

import subprocess
import sys

import numpy as np
from tiny import samples, save_llava, text_config
from transformers import LlamaForCausalLM

import compodistill as cd
from compodistill.precompute.run import PassOptions, precompute


def test_store_capture_and_student_agree_through_the_public_names(tmp_path, shard_of):
    shard = shard_of(samples(), tmp_path / "shard.tar")
    path = save_llava(tmp_path / "teacher")
    precompute([shard], path, str(tmp_path / "store"), PassOptions(codec="lossless", top_k=64))
    store = cd.open_store(tmp_path / "store")
    teacher = cd.load_model(path)
    for sample in samples():
        (captured,) = cd.capture(teacher, [cd.tokenize(teacher.processor, sample, teacher.image_token_id)])
        stored = store[sample.key]
        assert np.array_equal(stored.attention, captured.attention)
        assert np.array_equal(stored.logits.ids, captured.logits.ids)
        assert stored.groups == [(i, i) for i in range(2, 6)]
    LlamaForCausalLM(text_config(4, 16)).save_pretrained(tmp_path / "llm")
    assert cd.Student.from_store(store, llm=tmp_path / "llm").config.text_config.num_hidden_layers == 4


def test_importing_the_package_loads_neither_torch_nor_zarr():
    code = "import sys, compodistill; assert not {'torch', 'zarr', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
