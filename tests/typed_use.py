"""What a type checker makes of the library as it is used: pyright reads this, nobody runs it."""

from collections.abc import Iterator

import torch
from typing_extensions import assert_type

from minigpt2 import (
    GPT2,
    Completion,
    GPT2Config,
    KVCache,
    LoRALinear,
    Metrics,
    Piece,
    Run,
    Scores,
    Tokenizer,
    complete,
    finetune,
    generate,
    load,
    score,
    stream,
    stream_text,
)

model = GPT2(GPT2Config())
idx = torch.zeros(1, 2, dtype=torch.int64)
cache = model.make_cache(1)
tokenizer = Tokenizer.gpt2()

assert_type(cache, KVCache)
assert_type(model(idx), torch.Tensor)
assert_type(model(idx, cache), torch.Tensor)
assert_type(model.eval()(idx, cache=cache), torch.Tensor)
assert_type(load("gpt2", dtype="float16"), GPT2)
assert_type(GPT2.from_pretrained("gpt2", dtype="float16", device="cpu"), GPT2)
assert_type(model.to("cpu"), GPT2)
assert_type(generate(model, idx, max_new_tokens=1), list[list[int]])
assert_type(generate(model, [idx[0]], max_new_tokens=1, stop_ids=5), list[list[int]])
assert_type(complete(model, tokenizer, "One day", stop="."), list[Completion])
assert_type(stream(model, tokenizer, "One day", top_logprobs=3), Iterator[Piece])
assert_type(stream_text(model, tokenizer, "One day"), Iterator[str])
assert_type(score(model, tokenizer, "One day"), Scores)
assert_type(score(model, tokenizer, "One day", stride=7).nats, tuple[float | None, ...])
assert_type(tokenizer.decode(idx[0]), str)

run = finetune(model, tokenizer, texts=["One day"], out="runs/x", max_steps=3)
assert_type(run, Run)
assert_type(run.resume(max_steps=4), Run)
assert_type(run.model, GPT2)
assert_type(run.metrics, list[Metrics])


def through(part: LoRALinear, x: torch.Tensor) -> None:
    """An adapter's output is a tensor, too."""
    assert_type(part(x), torch.Tensor)
