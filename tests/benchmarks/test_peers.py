"""Other programs, as the benchmark asks them: what they are given is the model, and what they write
is its text. Each where it is installed.
"""

import pytest
import torch

from benches import loaded
from minigpt2.evaluation.agreement import shortfall
from minigpt2.model import GPT2, GPT2Config


@pytest.fixture(scope="module")
def bench():
    with loaded("decode") as module:
        yield module


@pytest.fixture(scope="module")
def peers():
    with loaded("peers") as module:
        yield module


@pytest.fixture(scope="module")
def folder(bench, tmp_path_factory):
    path = tmp_path_factory.mktemp("peers") / "model"
    shape = GPT2Config(vocab_size=300, block_size=320, n_embd=64, n_layer=2, n_head=2, n_inner=96)
    bench.randomised(shape).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("precision", "off"), [("float32", 0), ("float16", 2**-11), ("int8", 1 / 127)]
)
def test_the_gguf_file_has_every_tensor_under_llama_cpps_name(
    peers, folder, tmp_path, precision, off
):
    gguf = pytest.importorskip("gguf")
    path = peers.written_for_llama_cpp(folder, str(tmp_path / "peer"), precision)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    own = GPT2.from_pretrained(folder).state_dict()
    pairs = {
        "token_embd.weight": "wte.weight",
        "position_embd.weight": "wpe.weight",
        "output_norm.bias": "ln_f.bias",
        "blk.1.attn_qkv.weight": "h.1.attn.c_attn.weight",
        "blk.1.attn_qkv.bias": "h.1.attn.c_attn.bias",
        "blk.0.attn_output.weight": "h.0.attn.c_proj.weight",
        "blk.0.ffn_up.weight": "h.0.mlp.c_fc.weight",
        "blk.1.ffn_down.weight": "h.1.mlp.c_proj.weight",
        "blk.1.ffn_norm.weight": "h.1.ln_2.weight",
    }
    assert len(found) == len(own) and pairs.keys() <= found.keys()
    for theirs, ours in pairs.items():
        tensor = found[theirs]
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        error = (values.view(own[ours].shape) - own[ours]).abs().max() / own[ours].abs().max()
        exact = ours == "wpe.weight" or own[ours].dim() == 1
        assert error <= (0 if exact else off), theirs


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_llama_cpp_writes_the_models_text_in_every_row_and_anew_each_time(
    bench, peers, folder, tmp_path, monkeypatch, precision
):
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = peers.written_for_llama_cpp(folder, str(tmp_path / "peer"), precision)
    run, model = peers.llama_cpp(path, "cpu", precision), GPT2.from_pretrained(folder)
    rows = [[5, 6, 7], [200, 1, 90], [8, 250, 8]]
    # the last one takes more room than the cache of those before it
    for n_rows, new in ((3, 12), (3, 12), (1, 12), (3, 280)):
        texts = run(rows[:n_rows], new)
        assert [len(text) for text in texts] == [new] * n_rows
        for row, text in zip(rows, texts):
            most = bench.TOLERANCE["int8" if precision == "int8" else "float16"]
            assert shortfall(model, row, text) <= most
    assert len({tuple(text) for text in texts}) == 3


def test_ctranslate2_says_which_precision_it_has_not(peers, monkeypatch):
    peer = pytest.importorskip("ctranslate2")
    monkeypatch.setattr(peer, "get_supported_compute_types", lambda device: {"float32"})
    with pytest.raises(peers.Unable, match="CTranslate2 has no float16 on this cpu"):
        peers.ctranslate2("folder", "cpu", "float16")
