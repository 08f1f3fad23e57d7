"""The README's picture of the page that explains a model, from a real run.

python docs/explain_picture.py RUN    writes docs/explain.png; needs the test extra and chromium
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from browser import Opened, browser  # noqa: E402
from minigpt2 import GPT2, Tokenizer  # noqa: E402
from minigpt2.explain.page import Subject, write_page  # noqa: E402

PROMPT = "ISOBEL:\nThe lamp went out, and the lamp"


def main() -> None:
    """Write the page of a run, look at its heads, and take a picture of them."""
    run = Path(sys.argv[1])
    subject = Subject(run.name, GPT2.from_pretrained(run), Tokenizer.from_pretrained(run))
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        out = Path(folder) / "explain.html"
        write_page(out, [subject], PROMPT)
        with Opened(chromium, out, width=900) as tab:
            tab.set_default_timeout(120_000)
            tab.evaluate("document.querySelector('#place').style.position = 'static'")
            tab.evaluate("document.querySelector('#heads').scrollIntoView()")
            tab.wait_for_timeout(1000)
            box = tab.locator("#heads").bounding_box()
            assert box
            clip = {"x": 0, "y": box["y"] - 16, "width": 800, "height": 560}
            tab.screenshot(path=ROOT / "docs" / "explain.png", clip=clip)


if __name__ == "__main__":
    main()
