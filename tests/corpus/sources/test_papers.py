"""Papers and books as one reads them. Oracle: what was written, by python-docx or by the rules of
the formats.
"""

import gzip
import io
import sys
import zipfile

import docx
import pypdf
import pytest
from docx.oxml import parse_xml

from minigpt2.corpus.options import TextConfig
from minigpt2.corpus.sources import papers
from minigpt2.corpus.sources.find import find_sources, require_local
from minigpt2.corpus.sources.papers import PAPER_READERS
from minigpt2.errors import InputError, NotFoundError
from text_files import documents_of, texts_of, write

LINES = ["The lamp is lit,", "and the sea says nothing."]
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def word(lines=LINES):
    document = docx.Document()
    for line in lines:
        document.add_paragraph(line)
    return saved(document)


def saved(document):
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def changed(data, **members):
    """A zip file with other members, or without those that are None."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        old = {name: archive.read(name) for name in archive.namelist()}
    new = {name.replace("__", "/").replace("_", "."): value for name, value in members.items()}
    return zipped({k: v for k, v in {**old, **new}.items() if v is not None})


def rtf(lines=LINES):
    return r"{\rtf1\ansi\ansicpg1252 " + r"\par ".join([*lines, ""]) + "}"


def pdf(*pages):
    """A PDF whose pages have these lines, by the rules of PDF 1.4."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * n) for n in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(pages)),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for n, lines in enumerate(pages):
        shown = b" ".join(b"(%s) Tj T*" % line.encode() for line in lines)
        content = b"BT /F1 12 Tf 72 720 Td 14 TL %s ET" % shown
        objects += [
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % (5 + 2 * n),
            b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        ]
    data, places = b"%PDF-1.4\n", b"0000000000 65535 f \n"
    for n, body in enumerate(objects, 1):
        places += b"%010d 00000 n \n" % len(data)
        data += b"%d 0 obj\n%s\nendobj\n" % (n, body)
    size = len(objects) + 1
    end = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (size, len(data))
    return data + b"xref\n0 %d\n" % size + places + end


CONTAINER = """<?xml version="1.0"?>
<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>
<rootfile full-path="OPS/book.opf" media-type="application/oebps-package+xml"/>
</rootfiles></container>"""


def epub(pages, **more):
    """A book of these pages, in the order of its spine, which is not that of the file."""
    names = [f"p%20{9 - n}.xhtml" for n in range(len(pages))]
    items = "".join(f'<item id="i{n}" href="{name}"/>' for n, name in enumerate(names))
    spine = "".join(f'<itemref idref="i{n}"/>' for n in range(len(pages)))
    book = f"""<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}
    <item id="css" href="x.css"/></manifest><spine>{spine}</spine></package>"""
    members = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": CONTAINER,
        "OPS/book.opf": book,
        "OPS/x.css": "p { color: red }",
        "OPS/left out.xhtml": "<p>not in the spine</p>",
    }
    texts = zip(names, pages)
    return zipped({**members, **{f"OPS/{n.replace('%20', ' ')}": t for n, t in texts}, **more})


def page(body):
    return f'<html xmlns="http://www.w3.org/1999/xhtml"><head><title>t</title></head>{body}</html>'


SHAPES = {
    ".docx": changed(word(), word__styles_xml=None),  # which are much, and take long
    ".rtf": rtf().encode(),
    ".pdf": pdf(LINES[:1], LINES[1:]),
    ".epub": epub([page(f"<body><p>{line}</p></body>") for line in LINES]),
}


@pytest.mark.parametrize("suffix", PAPER_READERS)
def test_a_file_is_one_document_whose_lines_are_its_paragraphs(tmp_path, suffix):
    expected = [(0, "", "".join(f"{line}\n" for line in LINES))]
    assert documents_of(write(tmp_path, f"a{suffix}", SHAPES[suffix])) == expected
    assert documents_of(write(tmp_path, f"B{suffix.upper()}", SHAPES[suffix])) == expected
    packed = write(tmp_path, f"a{suffix}.gz", gzip.compress(SHAPES[suffix]))
    assert documents_of(packed, TextConfig(document_separator="a")) == expected
    assert documents_of(write(tmp_path, f"empty{suffix}", b"")) == [(0, "", "")]
    (tmp_path / f"empty{suffix}").unlink()
    for given in (tmp_path, tmp_path / "*"):
        assert len(find_sources([given]).sources) == 3
    require_local([tmp_path], TextConfig())


def test_all_that_one_reads_in_a_word_file_is_there(tmp_path):
    document = docx.Document()
    document.add_heading("A Lamp", 1)
    paragraph = document.add_paragraph("tab\tand  blanks, ")
    paragraph.add_run("bold").bold = True
    paragraph.add_run().add_break()
    paragraph.add_run("a new line < & “quoted” 日本")
    document.add_paragraph("")
    table = document.add_table(2, 2)
    for n, cell in enumerate(cell for row in table.rows for cell in row.cells):
        cell.text = f"cell {n}"
    table.cell(1, 1).add_paragraph("of two lines")
    document.add_paragraph("a point", style="List Bullet")
    document.sections[0].header.paragraphs[0].text = "on every page"
    for body in (
        '<w:ins w:id="1" w:author="x"><w:r><w:t>inserted</w:t></w:r></w:ins>'
        '<w:del w:id="2" w:author="x"><w:r><w:delText>deleted</w:delText></w:r></w:del>',
        "<w:sdt><w:sdtContent><w:r><w:t>a field</w:t></w:r></w:sdtContent></w:sdt>",
        '<w:hyperlink w:anchor="x"><w:r><w:t>a link</w:t></w:r></w:hyperlink>',
        '<w:r><w:t>noted</w:t></w:r><w:r><w:footnoteReference w:id="7"/></w:r>',
    ):
        document.element.body.insert(-1, parse_xml(f'<w:p xmlns:w="{WORD}">{body}</w:p>'))
    note = '<w:footnote w:id="7"><w:p><w:r><w:t>the note</w:t></w:r></w:p></w:footnote>'
    note = f'<w:footnotes xmlns:w="{WORD}">{note}</w:footnotes>'
    source = write(tmp_path, "a.docx", changed(saved(document), word__footnotes_xml=note))
    assert texts_of(source) == [
        "A Lamp\ntab\tand  blanks, bold\na new line < & “quoted” 日本\n\n"
        "cell 0\tcell 1\ncell 2\tcell 3 of two lines\na point\n"
        "inserted\na field\na link\nnoted\nthe note\n"
    ]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (r"one {\b bold\b0}  two\line three\tab x\par", "one bold  two\nthree\tx\n"),
        (r"caf\'e9 \u8220?q\u8221?\par", "café “q”\n"),
        (r"{\*\generator Mine;}{\info{\title T}}{\fonttbl{\f0 Times;}}x\par", "x\n"),
        (r"{\pict\wmetafile8 0102}y \{z\}\par", "y {z}\n"),
    ],
)
def test_rtf_is_read_without_its_marks(tmp_path, body, expected):
    data = rf"{{\rtf1\ansi\ansicpg1252 {body}}}"
    assert texts_of(write(tmp_path, "a.rtf", data)) == [expected]


def test_bytes_of_rtf_are_letters_of_its_code_page(tmp_path):
    for code, text in ((1252, "café"), (1251, "море"), (932, "日本")):
        body = text.encode(f"cp{code}")
        if code == 932:  # its second bytes may be those of marks
            body = b"".join(b"\\'%02x" % byte for byte in body)
        data = rb"{\rtf1\ansi\ansicpg%d " % code + body + rb"\par}"
        assert texts_of(write(tmp_path, "a.rtf", data)) == [f"{text}\n"]


def test_a_book_is_read_in_the_order_of_its_spine_as_html_is(tmp_path):
    pages = [
        page("<body><h1>One</h1><p>a &amp; b</p></body>"),
        page("<body></body>"),
        page("<body><p>c<br/>日本</p><script>x</script></body>"),
    ]
    source = write(tmp_path, "a.epub", epub(pages))
    (text,) = texts_of(source)
    assert [line for line in text.split("\n") if line] == ["One", "a & b", "c", "日本"]
    for n, part in enumerate(pages):  # each as the HTML file that it is
        (alone,) = texts_of(write(tmp_path, f"{n}.html", part))
        assert alone in text


def encrypted(password, owner=None):
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(SHAPES[".pdf"]))
    writer.encrypt(password, owner, algorithm="RC4-128")
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


def test_a_pdf_that_anybody_may_read_needs_no_password(tmp_path):
    assert texts_of(write(tmp_path, "a.pdf", encrypted("", "owner"))) == [
        f"{LINES[0]}\n{LINES[1]}\n"
    ]


BAD = [
    ("pdf", encrypted("secret"), "is encrypted: save it without a password"),
    ("pdf", pdf([], []), "has no text in it, and may be a scan: .*ocrmypdf"),
    ("pdf", b"%PDF-1.4\n", r"cannot be read as PDF \(.*\): open and save it anew"),
    ("pdf", b"only text", "is no PDF file: give it the suffix of what it is"),
    ("docx", word([]), "has no text in it: leave it out"),
    ("docx", zipped({"a.txt": "x"}), r"cannot be read as Word \(.*docx.*\)"),
    ("docx", changed(SHAPES[".docx"], word__document_xml="<a"), r"cannot be read as Word \(.*\)"),
    ("docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "is an old or encrypted Office file"),
    ("docx", rtf().encode(), r"is an RTF document: give it a name that ends in \.rtf"),
    ("docx", b"only text", "is no Word file"),
    ("rtf", rtf().encode()[:-1], "is no whole RTF file: it ends early"),
    ("rtf", b"only text", "is no RTF file"),
    ("rtf", rb"{\rtf1\ansi\ansicpg99999 \'e9}", "cannot be read as RTF"),
    ("rtf", rb"{\rtf1\ansi }", "has no text in it"),
    ("epub", epub([]), "has no text in it"),
    ("epub", zipped({"mimetype": "x"}), r"cannot be read as EPUB \(.*container"),
    ("epub", epub([page("x")], **{"OPS/book.opf": "<a"}), "cannot be read as EPUB"),
    ("epub", epub(["<p>\xe9".encode("latin-1")]), "cannot be read as EPUB .*utf-8"),
    (
        "epub",
        epub([b"\xff\xfe\x80"], **{"META-INF/encryption.xml": "<encryption/>"}),
        "is encrypted: save it without copy protection",
    ),
]


@pytest.mark.parametrize(("suffix", "data", "message"), BAD)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, suffix, data, message):
    with pytest.raises(InputError, match=rf"a\.{suffix} {message}") as problem:
        documents_of(write(tmp_path, f"a.{suffix}", data))
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("suffix", PAPER_READERS)
def test_damage_at_any_place_is_no_crash(tmp_path, suffix):
    data = SHAPES[suffix]
    for at in range(1, len(data), len(data) // 3):
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]):
            try:
                documents_of(write(tmp_path, f"a{suffix}", damaged))
            except InputError as problem:
                assert f"a{suffix}" in str(problem)
    if suffix in (".docx", ".epub", ".rtf"):
        with pytest.raises(InputError):
            documents_of(write(tmp_path, f"a{suffix}", data[: len(data) // 2]))


@pytest.mark.parametrize("suffix", PAPER_READERS)
def test_a_file_that_unpacks_to_much_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(papers, "MOST_BYTES", 10**6 if suffix == ".docx" else 9999)
    long = "x" * 99
    bombs = {
        ".docx": changed(SHAPES[".docx"], word__document_xml=" " * 10**6),
        ".epub": epub([" " * 10**6]),
        ".rtf": rtf([long] * 101).encode(),
        ".pdf": pdf([long] * 101),
    }
    with pytest.raises(InputError, match=rf"a{suffix} unpacks to more than 0 MiB of text: save"):
        documents_of(write(tmp_path, f"a{suffix}", bombs[suffix]))


@pytest.mark.slow
def test_entities_that_multiply_are_refused(tmp_path):
    entities = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 10}">' for n in range(9))
    bomb = f'<!DOCTYPE a [<!ENTITY e0 "xxxxxxxxxx">{entities}]><a>&e9;</a>'
    for name, data in {
        "a.docx": changed(word([]), word__document_xml=bomb, word__styles_xml=None),
        "a.epub": epub([page("x")], **{"OPS/book.opf": bomb}),
    }.items():
        with pytest.raises(InputError, match=rf"{name} cannot be read as .*"):
            documents_of(write(tmp_path, name, data))


@pytest.mark.parametrize("suffix", papers.PACKAGES)
def test_without_a_reader_its_files_are_left_out_with_how_to_get_it(tmp_path, monkeypatch, suffix):
    package = papers.PACKAGES[suffix]
    monkeypatch.setitem(sys.modules, package, None)
    install = r'pip install "minigpt2\[documents\]"'
    source = write(tmp_path, f"a{suffix}", SHAPES[suffix])
    message = rf"reading {suffix} files needs {package}: {install}$"
    with pytest.raises(InputError, match=message):
        documents_of(source)
    with pytest.raises(InputError, match=message):
        require_local([source.path], TextConfig())
    for given in (tmp_path, tmp_path / "*"):
        with pytest.raises(NotFoundError, match=rf"left out: 1 {suffix} \({install}\)"):
            find_sources([given])
