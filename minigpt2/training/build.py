"""A run from its options: text, tokenizer, weights (first or resumed), plan, put together.

Everything but the weights comes first (`specify`): what is wrong with the text or the settings is
said before they are downloaded, and the processes that tokenize have the memory to themselves.
`assemble` loads and places the model. Knows options, nothing of command lines: who calls it speaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

from ..arguments import shown
from ..corpus.options import unescape
from ..corpus.prepared import Corpus, prepare
from ..corpus.sources.find import require_local
from ..corpus.tokenizing import default_workers
from ..corpus.vocabulary import in_own_vocabulary, own_vocabulary, require_trainer
from ..decoding.text import check_fits
from ..errors import InputError, OptionError
from ..evaluation.scorer import Scorer
from ..formats import hugging_face
from ..formats.bases import is_adapter
from ..hub.folders import MODEL_FILES, model_folder, revision_of
from ..lora import add_lora, base_identity, load_adapter, save_adapter, train_rows
from ..model import GPT2, PRESETS, GPT2Config, config_of, skeleton
from ..runs import kept
from ..runs.folder import Checkpoint, RunFolder
from ..runs.state import FROM_TEXT, Facts
from ..system.files import at_one_moment
from ..system.memory import memory_budget
from ..system.precision import Precision, pick_dtype
from ..system.processes import World, replicate, shard
from ..tokenizer import Tokenizer
from .blocks import prepare_blocks
from .forecast import MemoryForecast, count_operations, fitting_micro_batch, forecast_memory
from .loop import Job
from .options import TrainOptions
from .plan import Plan, make_plan, recipe_for, remarks
from .ways import COMPILED, PLAIN, choose_way, go

BLOCK = 2**20  # tokens that are looked at together
# tokens at once on the CPU: more take memory and gain no speed, but for narrow models, where what
# is done for each call of an operation counts
ENOUGH_TOKENS, ENOUGH_NUMBERS = 2048, 2**19


@dataclass(frozen=True)
class Origin:
    """Where the weights of a run come from, before they are loaded: a preset's random numbers, the
    pretrained model in the folder `base`, the checkpoint `start`, or both with adapters.
    """

    options: TrainOptions
    start: Checkpoint | None
    base: Path | None  # may be without its weights
    vocabulary: Tokenizer | None = None  # that was trained on the text of a run that begins


@dataclass(frozen=True)
class RunSpec:
    """A training run before its weights are there."""

    origin: Origin
    run: RunFolder
    world: World
    precision: Precision
    tokenizer: Tokenizer
    corpus: Corpus
    plan: Plan
    way: str  # of its steps, as in ways.py
    facts: Facts  # what a resumed run must have in common with this one
    remarks: tuple[str, ...]  # on settings that change nothing, or that are odd


@dataclass(frozen=True)
class Built:
    """A training run that can start."""

    job: Job
    start: Checkpoint | None  # which it goes on from, and whose weights the model has
    need: MemoryForecast  # of one process


def build(options: TrainOptions, run: RunFolder, device: torch.device, world: World) -> Built:
    """All that a run in this folder consists of; every process calls it.

    Raises InputError for a text, a model or options that cannot be used, and, to resume, for those
    of another run.
    """
    return assemble(specify(options, run, device, world))


def specify(options: TrainOptions, run: RunFolder, device: torch.device, world: World) -> RunSpec:
    """Read the text and decide all, without loading the weights. Raises what `build` does."""
    if options.resume:  # a run that begins was asked about its text before its folder was made
        require_local([*options.data, *options.val_data])
    precision = Precision(device, pick_dtype(options.dtype, device, training=True))
    start = run.newest() if options.resume and run.checkpoints() else None
    origin, in_gpt2s = Origin(options, start, find_base(options, start, world)), None
    if options.train_vocabulary and not start:
        require_trainer()
        in_gpt2s = read_text(options, Tokenizer.gpt2(), world)
        origin = replace(origin, vocabulary=trained_vocabulary(options, in_gpt2s, world))
    model, tokenizer = without_weights(origin), tokenizer_of(origin)
    train_added(model, options, tokenizer)
    check_fits(tokenizer, model, training=True)
    facts = chosen_facts(origin, tokenizer)
    if start:
        start.require(facts, but=FROM_TEXT)
    corpus = read_corpus(options, tokenizer, model.config.vocab_size, world, in_gpt2s)
    if corpus.counts.get("chats"):
        tokenizer = tokenizer.with_chat_template()
        require_whole_chats(options, tokenizer, corpus)
    if options.training.patience and corpus.val is None:
        names = ("patience", "val_data", "val_fraction")
        raise OptionError("patience needs held-out text: give val_data or val_fraction", *names)
    plan = plan_of(origin, model, corpus, world)
    way = way_of(origin, model, plan, precision, world)
    plan = with_micro_batch(plan, origin, model, precision, way, world)
    facts = replace(
        facts, data=corpus.identity, batch_size=plan.batch_size, block_size=plan.block_size
    )
    if start:
        start.require(facts)
    return RunSpec(
        origin=origin,
        run=run,
        world=world,
        precision=precision,
        tokenizer=tokenizer,
        corpus=corpus,
        plan=plan,
        way=way,
        facts=facts,
        remarks=(*odd_settings(options, model.config, corpus, plan, world),),
    )


def assemble(spec: RunSpec) -> Built:
    """Load the weights and put them where they are trained. Raises what `build` does."""
    options, plan, world = spec.origin.options, spec.plan, spec.world
    model = first_model(spec.origin, spec.tokenizer)
    need = memory_need(spec.origin, model, spec.precision, spec.way, world)(
        micro_batch_size=plan.micro_batch_size,
        block_size=plan.block_size,
        accumulated=plan.micro_batch_size * world.size < plan.batch_size or world.size > 1,
    )
    job = Job(
        model=model,
        scorer=place(spec, model),
        tokenizer=spec.tokenizer,
        corpus=spec.corpus,
        plan=plan,
        run=spec.run,
        precision=spec.precision,
        facts=spec.facts,
        write_weights=weights_writer(options, model, spec.tokenizer),
        world=world,
        mask_prompt=options.mask_prompt,
        special_tokens=options.text.special_tokens,
    )
    return Built(job, spec.origin.start, need)


def find_base(options: TrainOptions, start: Checkpoint | None, world: World) -> Path | None:
    """The folder of the pretrained model that the run starts from, if it does, without its weights;
    of the same commit for every process.
    """
    if options.preset or (start and not options.lora_rank):
        return None
    folder = model_folder(options.source, with_weights=False)
    revision = world.gather(revision_of(options.source, folder))[0]
    if revision == revision_of(options.source, folder):
        return folder
    return model_folder(options.source, revision, with_weights=False)


def first_config(origin: Origin) -> GPT2Config:
    """The shape of the weights that the run starts from."""
    if origin.base is not None:
        return config_of(origin.base)
    if origin.start:
        return config_of(origin.start.path)
    assert origin.options.preset is not None, "other runs start from a model that was found"
    config = PRESETS[origin.options.preset]
    if origin.vocabulary:
        return replace(config, vocab_size=origin.vocabulary.vocab_size)
    return replace(config, vocab_size=origin.options.vocab_size or config.vocab_size)


def tokenizer_of(origin: Origin) -> Tokenizer:
    """The tokenizer that belongs to the preset or to the pretrained model, or is the run's own."""
    if origin.vocabulary:
        return origin.vocabulary
    if origin.options.preset and not origin.options.train_vocabulary:
        return Tokenizer.gpt2(first_config(origin).vocab_size)
    if origin.base is None:  # the weights are the run's own
        assert origin.start is not None, "without a checkpoint there is a base"
        return Tokenizer.from_pretrained(origin.start.path)
    return Tokenizer.of_model(origin.options.source, origin.base)


def without_weights(origin: Origin) -> GPT2:
    """The model that is trained, on the meta device: all of it that the plan needs to know."""
    options, base = origin.options, origin.base
    if base is not None and base == Path(options.source) and not is_adapter(base):
        model = at_one_moment(base, MODEL_FILES, lambda: checked_skeleton(base))
    else:
        with torch.device("meta"):
            model = GPT2(first_config(origin))
    set_dropout(model, origin)
    if options.lora_rank:
        add_lora(model, rank=options.lora_rank, alpha=1, generator=torch.Generator())
    return model


def train_added(model: GPT2, options: TrainOptions, tokenizer: Tokenizer) -> None:
    """Beside adapters, train the rows of the tokens that the run has added."""
    if options.lora_rank and options.add_tokens:
        words = map(unescape, options.add_tokens)
        train_rows(model, [id for word in words for id in tokenizer.encode(word, special=True)])


def checked_skeleton(folder: Path) -> GPT2:
    """The model of a folder without its weights, which are here already and are seen to fit."""
    model, files = skeleton(folder)
    hugging_face.check(model, files)
    return model


def first_model(origin: Origin, tokenizer: Tokenizer) -> GPT2:
    """The model that the run starts from: a checkpoint, random weights, or pretrained ones, with
    adapters if they are what is trained.
    """
    options, start = origin.options, origin.start
    random = torch.Generator().manual_seed(options.training.seed)
    if origin.base is not None:
        model = pretrained(options.source, origin.base, tokenizer)
    elif start:
        model = GPT2.from_pretrained(start.path)
    else:
        model = GPT2(first_config(origin), generator=random)
    set_dropout(model, origin)
    if options.lora_rank and start:
        load_adapter(model, start.path)
    elif options.lora_rank:
        add_lora(model, rank=options.lora_rank, alpha=lora_alpha(options), generator=random)
        train_added(model, options, tokenizer)
    return model


def pretrained(source: str, base: Path, tokenizer: Tokenizer) -> GPT2:
    """The weights at the commit, or in the folder, that the tokenizer was taken from.

    Raises InputError when the folder has another tokenizer by now.
    """
    folder = model_folder(source, revision_of(source, base))
    model, beside = at_one_moment(
        folder,
        MODEL_FILES,
        lambda: (GPT2.from_pretrained(folder), Tokenizer.of_model(source, folder)),
    )
    if beside.identity != tokenizer.identity:
        raise InputError(f"{source} got another tokenizer while the text was read: start again")
    check_fits(tokenizer, model, training=True)
    return model


def set_dropout(model: GPT2, origin: Origin) -> None:
    """Set the dropout that was asked for, or that the run had."""
    dropout = origin.options.dropout
    if dropout is None and origin.start:
        dropout = origin.start.settings.dropout  # a base model has its own
    if dropout is not None:
        model.set_dropout(dropout)


def lora_alpha(options: TrainOptions) -> float:
    """The strength of adapters that are new."""
    return options.lora_alpha or 2 * options.lora_rank


def chosen_facts(origin: Origin, tokenizer: Tokenizer) -> Facts:
    """What a resumed run must have in common with this one, as far as it is known before the text
    is read.
    """
    options = origin.options
    return Facts(
        preset=options.preset,
        model=None if options.preset else source_name(origin),
        train_vocabulary=options.train_vocabulary or None,
        vocab_size=chosen_vocab_size(options),
        tokenizer=tokenizer.identity,
        val_fraction=0.0 if options.val_data else options.val_fraction,
        document_mask=options.document_mask,
        mask_prompt=options.mask_prompt,
        special_tokens=options.text.special_tokens or None,
        add_tokens=options.add_tokens or None,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_rank and lora_alpha(options),
        seed=options.training.seed,
    )


def chosen_vocab_size(options: TrainOptions) -> int | None:
    """The size that was asked for; None where that is the preset's, or nothing was asked."""
    usual = PRESETS[options.preset].vocab_size if options.preset else None
    return None if options.vocab_size == usual else options.vocab_size


def source_name(origin: Origin) -> str:
    """The model that the run starts from, by the name it had at the run's start: the base that
    adapters are for is compared by what is in it, and a folder may be found by another path.
    """
    options = origin.options
    source = kept.named(options.source, Path(options.folder))
    before = origin.start.facts.model if origin.start else None
    if before is None:
        return source
    same = Path(before).exists() and Path(options.source).exists()
    same = same and Path(before).samefile(options.source)
    return before if same or options.lora_rank else source


def trained_vocabulary(options: TrainOptions, in_gpt2s: Corpus, world: World) -> Tokenizer:
    """The vocabulary of a text that was read in GPT-2's tokens; the first process of each machine
    trains it. Raises InputError where two machines come to different ones.
    """
    assert options.preset is not None, "a model has its vocabulary"
    with world.main_first():
        tokenizer = own_vocabulary(
            in_gpt2s,
            options.vocab_size or PRESETS[options.preset].vocab_size,
        )
    if len({*world.gather(tokenizer.identity)}) > 1:
        raise InputError(
            "the vocabularies that two machines trained differ: have the same text and the same "
            "version of tokenizers on all"
        )
    return tokenizer


def read_corpus(
    options: TrainOptions,
    tokenizer: Tokenizer,
    n_rows: int,
    world: World,
    in_gpt2s: Corpus | None = None,
) -> Corpus:
    """The text in the run's tokens; `in_gpt2s` is the same text in GPT-2's, if that was read."""
    if options.train_vocabulary:
        in_gpt2s = in_gpt2s or read_text(options, Tokenizer.gpt2(), world)
        with world.main_first():
            return in_own_vocabulary(
                in_gpt2s,
                tokenizer,
                workers=options.workers or default_workers(),
            )
    corpus = read_text(options, tokenizer, world)
    if tokenizer.vocab_size > n_rows:  # it has added words without a row
        require_rows(corpus, tokenizer, n_rows)
    return corpus


def read_text(options: TrainOptions, tokenizer: Tokenizer, world: World) -> Corpus:
    """The text as tokens; the first process of each machine makes the files."""
    if world.size > 1 and "-" in (*options.data, *options.val_data):
        raise OptionError(
            "data - with several processes: save the text to a file first", "data", "val_data"
        )
    with world.main_first():
        corpus = prepare(
            options.data,
            tokenizer,
            val_paths=options.val_data,
            val_fraction=options.val_fraction,
            text=options.text,
            workers=options.workers or default_workers(),
        )
    return corpus


def require_whole_chats(options: TrainOptions, tokenizer: Tokenizer, corpus: Corpus) -> None:
    """Raise OptionError where documents are told apart by what also ends the answers of chats."""
    several = corpus.counts.get("chats_of_several_answers")
    if options.document_mask and several and not tokenizer.chat.end_of_answer:
        raise OptionError(
            "document_mask hides what is before an end-of-text, and answers end with one: in "
            f"{several:,} chats the later answers would not see the earlier; leave it out",
            "document_mask",
        )


def require_rows(corpus: Corpus, tokenizer: Tokenizer, n_rows: int) -> None:
    """Raise InputError for a text that has a token for which the model has no row."""
    for file in filter(None, (corpus.train, corpus.val)):
        for start in range(0, len(file.tokens), BLOCK):
            ids = file.block(start, start + BLOCK)
            if int(ids.max()) >= n_rows:
                at = int((ids >= n_rows).argmax())
                (document,) = file.documents_at([start + at])
                raise InputError(
                    f"{document.label} has the token {shown(tokenizer.token_text(int(ids[at])))}, "
                    f"id {ids[at]}, for which the model has no row: it has {n_rows:,}"
                )


def plan_of(origin: Origin, model: GPT2, corpus: Corpus, world: World) -> Plan:
    """The plan of the run, before it is asked what fits into memory."""
    options = origin.options
    return make_plan(
        options.training,
        model.config,
        recipe_for(options.preset, lora=bool(options.lora_rank)),
        n_tokens=len(corpus.train.tokens),
        n_processes=world.size,
    )


def way_of(origin: Origin, model: GPT2, plan: Plan, precision: Precision, world: World) -> str:
    """The way that the run computes its steps in, the same for all processes; a resumed one goes on
    as it did.
    """
    options, start = origin.options, origin.start
    n_parameters, n_trained = parameter_counts(model)
    n_tokens = plan.max_steps * plan.batch_size * plan.block_size
    choose = partial(
        choose_way,
        precision,
        operations=count_operations(n_parameters, n_tokens, n_trained=n_trained) / world.size,
        sharded=options.fsdp,
        recorded=(start.settings.way or PLAIN) if start else None,
    )
    found = {*world.gather(choose(compiled=options.compile))}
    return found.pop() if len(found) == 1 else choose(compiled=False)


def with_micro_batch(
    plan: Plan, origin: Origin, model: GPT2, precision: Precision, way: str, world: World
) -> Plan:
    """The plan with a micro-batch that fits into memory, the same for all processes.

    A resumed run keeps the micro-batch it had: another one would round and drop out differently.
    """
    options, rows = origin.options, plan.micro_batch_size
    if options.training.micro_batch_size is None and origin.start:
        rows = min(rows, origin.start.state.micro_batch_size)
    elif options.training.micro_batch_size is None:
        if precision.device.type == "cpu":
            rows = min(rows, enough_rows(model.config, plan.block_size))
        rows = fitting_micro_batch(
            memory_need(origin, model, precision, way, world),
            rows=rows,
            block_size=plan.block_size,
            budget=memory_budget(precision.device, world.size),
        )
    return replace(plan, micro_batch_size=min(world.gather(rows)))


def enough_rows(config: GPT2Config, block_size: int) -> int:
    """How many sequences at once are enough on the CPU for its full speed."""
    return max(1, max(ENOUGH_TOKENS, ENOUGH_NUMBERS // config.n_embd) // block_size)


def odd_settings(
    options: TrainOptions, model: GPT2Config, corpus: Corpus, plan: Plan, world: World
) -> Iterator[str]:
    """What of the options changes nothing or is odd with this text and model: a line each."""
    n_tokens = len(corpus.train.tokens)
    wanted = options.training.block_size or model.block_size
    if plan.block_size < wanted:
        yield (
            f"the training text has {n_tokens:,} tokens, fewer than a window of {wanted}: windows "
            f"are of {plan.block_size}, and longer passages are not learned"
        )
    yield from remarks(options.training, plan, n_tokens=n_tokens, n_processes=world.size)
    if options.lora_rank > model.n_embd:
        yield (
            f"--lora-rank is {options.lora_rank}, no matrix of this model has more than rank "
            f"{model.n_embd}: what is above it takes memory and time and adds nothing"
        )
    if options.document_mask and len(corpus.train.documents) == 1:
        yield "--document-mask changes nothing: the training text is one document"


def memory_need(
    origin: Origin, model: GPT2, precision: Precision, way: str, world: World
) -> Callable[..., MemoryForecast]:
    """From micro_batch_size and block_size to the memory that one process of this run needs."""
    options = origin.options
    return partial(
        forecast_memory,
        model.config,
        dtype=precision.dtype,
        device=precision.device,
        activation_checkpointing=options.activation_checkpointing,
        n_trained=parameter_counts(model)[1],
        n_shards=world.size if options.fsdp else 1,
        masked=options.document_mask,
        way=way,
    )


def parameter_counts(model: GPT2) -> tuple[int, int]:
    """How many numbers a model has, and how many of them are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained)


def place(spec: RunSpec, model: GPT2) -> nn.Module:
    """Put the model where it is trained: the module that goes from ids to a loss, as DDP or FSDP
    and compiled or recomputed blocks make it.
    """
    options, plan, precision = spec.origin.options, spec.plan, spec.precision
    if options.fsdp and precision.scaler.is_enabled():
        raise OptionError(
            "dtype float16 with fsdp is not supported: use bfloat16 or float32", "dtype", "fsdp"
        )
    if options.fsdp:
        blocks = [f"h.{i}" for i in range(len(model.h))]
        shard(model, blocks, precision.device, methods=("hidden", "head"))
    else:
        model.to(precision.device)
    go(model, spec.way)
    prepare_blocks(
        model,
        precision,
        (plan.micro_batch_size, plan.block_size),
        compiled=spec.way == COMPILED,
        recomputed=options.activation_checkpointing,
        masked=options.document_mask,
    )
    scorer = Scorer(model, spec.tokenizer.eot if options.document_mask else None)
    if spec.world.size > 1 and not options.fsdp:
        return replicate(scorer, precision.device)
    return scorer


def weights_writer(
    options: TrainOptions, model: GPT2, tokenizer: Tokenizer
) -> Callable[[GPT2, Path], None]:
    """How the weights of this run are written into a folder: as a model, or as an adapter."""

    def write_model(model: GPT2, folder: Path) -> None:
        model.save_pretrained(folder, tokenizer)

    if not options.lora_rank:
        return write_model
    identity, source = base_identity(model), Path(options.source)
    base = str(source.resolve()) if source.exists() else options.source

    def write_adapter(model: GPT2, folder: Path) -> None:
        save_adapter(model, folder, base_model=base, identity=identity)
        tokenizer.save(folder, model_max_length=model.config.block_size)

    return write_adapter
