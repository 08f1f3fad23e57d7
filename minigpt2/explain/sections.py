"""The parts of the page, as text flows through them: what each shows, and the code that does it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import cache, model, sampling, tokenizer
from ..evaluation import score
from . import compared, costs, measures

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Section:
    """A part of the page: its view (page.js) is found by its name."""

    name: str
    title: str
    text: str
    code: tuple[Callable, ...]


@dataclass(frozen=True)
class Code:
    """A piece of code, where it is, and its text."""

    name: str
    file: str  # below the package
    line: int
    text: str

    @classmethod
    def of(cls, found: Callable) -> Code:
        """A function, method or class as it stands in its file."""
        found = inspect.unwrap(found)  # of torch.no_grad
        lines, line = inspect.getsourcelines(found)
        file = Path(inspect.getfile(found)).relative_to(PACKAGE).as_posix()
        return cls(found.__qualname__, file, line, textwrap.dedent("".join(lines)))

    @property
    def id(self) -> str:
        """The name of its place in the page."""
        return f"code-{self.file.removesuffix('.py').replace('/', '-')}-{self.name}"


SECTIONS = (
    Section(
        "tokens",
        "Text becomes tokens",
        "A model reads numbers, not letters. The text is cut into pieces, and each piece begins as "
        "its UTF-8 bytes. Then, over and over, the two neighbours are joined whose union stands "
        "first in a list that was made once from much text. What is left are the tokens, and "
        "each has a number of its own, its id.",
        (tokenizer.Tokenizer.encode, tokenizer.Tokenizer.merge_steps),
    ),
    Section(
        "embeddings",
        "Tokens become vectors",
        "Every id has a row of numbers in one table (wte), and every place in the text a row in "
        "another (wpe). "
        "The two are added. This vector is the token’s residual stream: all that follows reads it "
        "and adds to it.",
        (model.GPT2.read,),
    ),
    Section(
        "attention",
        "One block: gathering",
        "A layer norm moves each vector to mean 0 and deviation 1, and then scales each of its "
        "numbers by a weight of the model’s own. Then every head makes three vectors of "
        "it: a query (what am I looking for?), a key (what do I have?) and a value (what do I "
        "give?). Query times key is a score; tokens that come later are masked, softmax makes "
        "shares of the scores, and each token gathers the values by these shares, its own too.",
        (model.Block.forward, model.attention_probs, model.CausalSelfAttention.plain_attention),
    ),
    Section(
        "mlp",
        "One block: thinking",
        "After another layer norm, each token passes by itself through two matrices with a bend "
        "between them: numbers below zero are pressed towards it. Every neuron of the inner row "
        "answers to some pattern in the stream, and what they say is added to it.",
        (model.MLP.forward,),
    ),
    Section(
        "heads",
        "All heads at a glance",
        "Every small map is one head: a row for each token, strong where it looks. A line beside "
        "the diagonal is a head that looks at the token before. One further away often is a head "
        "that finds what came after the same token earlier; that is called induction, and needs a "
        "text in which tokens come again.",
        (measures.previous_token_scores, measures.induction_scores),
    ),
    Section(
        "stream",
        "Through the layers",
        "What would the model say next if it ended here? The logit lens puts the stream at each "
        "depth through the final layer norm and the output matrix. Below it is what moved the "
        "score of the likeliest next token: every head and every MLP adds its part, and the parts "
        "add up to the score.",
        (model.GPT2.head, measures.logit_lens, measures.attribution),
    ),
    Section(
        "next",
        "The next token",
        "The scores after the last token become probabilities, and one token is drawn. "
        "Temperature sharpens or flattens them, top-k, top-p and min-p drop what is unlikely, the "
        "penalty lowers what the text has already. Move a slider: "
        "this page computes what the library would.",
        (sampling.probabilities, sampling.top_p),
    ),
    Section(
        "surprise",
        "How surprised was it?",
        "Minus the logarithm of the probability that the model gave to each token before it saw "
        "it, in nats: 0 is certain, 0.7 an even chance between two. Their mean is the loss that "
        "training makes small, and e to the power of it the perplexity.",
        (score.score,),
    ),
    Section(
        "cache",
        "What the cache saves",
        "Keys and values of tokens do not change when the text goes on. So they are kept, and a "
        "new token costs its own work only, and a look at those before it. Counted in "
        "multiplications for the next token of this prompt.",
        (cache.LayerCache.append, costs.multiplications),
    ),
)

DIFFERENCES = Section(
    "differences",
    "Where the two differ",
    "The same prompt, token by token. How far apart the streams are is a share of the first "
    "model’s; how far the predictions are apart is the Kullback-Leibler divergence of the "
    "second’s from the first’s, in nats: 0 where they say the same. The weights are those that "
    "moved furthest, as a share of their size in the first.",
    (compared.differences,),
)


def sections_of(n_models: int) -> tuple[Section, ...]:
    """Those of a page about so many models."""
    return (*SECTIONS, DIFFERENCES) if n_models > 1 else SECTIONS


def shown_code(sections: tuple[Section, ...]) -> list[Code]:
    """The code of all sections, each piece once."""
    return [Code.of(found) for found in dict.fromkeys(f for s in sections for f in s.code)]
