"""The documentation holds: links resolve, commands parse, numbers are those of results files.

A number is tied to its source like this, where all that stands before ``metric`` picks one row::

    <!-- from results/nano/x.jsonl policy=hess setting=0.8,0.4 metric=auc_30*100 -->51.2<!-- -->
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from hess.cli.main import VERBS, main

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]

FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(<?([^)\s>]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#+\s+(.*?)\s*#*$", re.MULTILINE)
MARKER = re.compile(r"<!-- from (\S+) ([^<>]*?) -->([^<]*)<!-- -->")
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:home|Users|root|work|workspace)/\w+")


# Links


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))


def anchors(text: str) -> set[str]:
    """The ids that GitHub gives to the headings of a page."""
    found: list[str] = []
    for heading in HEADING.findall(FENCED.sub("", text)):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def broken_links(page: Path) -> list[str]:
    """Relative links and images of a page that lead nowhere."""
    broken = []
    for link in (a or b for a, b in LINK.findall(without_code(page.read_text()))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_resolve(page: str) -> None:
    assert broken_links(ROOT / page) == []


def test_the_link_checker_finds_what_is_broken(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# What's `new`?\n## Two\n```\n# no heading\n```\n## Two\n")
    page.write_text(
        "# Here\n[a](other.md#whats-new) [b](other.md#two-1) [c](#here) [d](https://x.org/none)\n"
        "`[code](none.md)` <img src=\"other.md\"> ![e](other.md 'title')\n"
        '[1](none.md) ![2](none.png) [3](#there) [4](other.md#no-heading) <img src="none.png">\n'
    )
    expected = ["none.md", "none.png", "#there", "other.md#no-heading", "none.png"]
    assert broken_links(page) == expected


# Commands


def commands(text: str) -> Iterator[list[str]]:
    """Command lines in the fenced blocks of a page, without comments."""
    for block in FENCED.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(\$ )?(hess|make|python3?) ", line):
                yield shlex.split(line.removeprefix("$ "), comments=True)


DOCUMENTED = [(page, command) for page in PAGES for command in commands((ROOT / page).read_text())]


@pytest.mark.parametrize(("page", "command"), DOCUMENTED)
def test_documented_commands_exist(
    page: str, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *arguments = command
    if program == "hess":
        for verb in VERBS.values():
            monkeypatch.setattr(verb, "run", lambda self: None)
        assert main(arguments) == 0
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {argument for argument in arguments if "=" not in argument} <= {*targets}
    elif arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file()


def test_commands_are_found() -> None:
    text = "```\nhess inspect \\\n  nano   # why\nother\n```\nhess no\n```sh\n$ make demo\n```\n"
    assert list(commands(text)) == [["hess", "inspect", "nano"], ["make", "demo"]]
    programs = [(page, command[:2]) for page, command in DOCUMENTED]
    assert ("README.md", ["make", "demo"]) in programs
    assert ("README.md", ["hess", "reconstruct"]) in programs


# Numbers


def row_value(row: dict[str, Any], key: str) -> Any:
    """A field of a row; ``a.b`` is field b of field a, ``setting`` the pair of both ratios."""
    if key == "setting":
        return [row.get("sparse_ratio"), row.get("cdf_threshold")]
    return reduce(lambda value, name: (value or {}).get(name), key.split("."), row)


def wanted_value(key: str, text: str) -> Any:
    if key == "setting":
        return [float(number) for number in text.split(",")]
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_marker(root: Path, file: str, pairs: str, printed: str) -> str | None:
    """What is wrong with one marked number, if anything is."""
    if not (root / file).is_file():
        return "no such file"
    wanted = dict(pair.partition("=")[::2] for pair in shlex.split(pairs))
    metric, _, factor = wanted.pop("metric", "").partition("*")
    rows = [json.loads(line) for line in (root / file).read_text().splitlines()]
    picked = [
        row
        for row in rows
        if all(row_value(row, key) == wanted_value(key, text) for key, text in wanted.items())
    ]
    if len(picked) != 1:
        return f"{len(picked)} rows match {wanted}"
    for name, text in zip((metric, f"{metric}_se"), printed.split("±"), strict=False):
        value = row_value(picked[0], name)
        number = re.fullmatch(r"([+-]?)(\d+(?:\.(\d+))?)", text.strip(" %").replace("−", "-"))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"the row has no number {name!r}"
        if number is None:
            return f"{text!r} is no number"
        exact = f"{value * float(factor or 1):.{len(number[3] or '')}f}"
        if float(number[0]) != float(exact):
            return f"says {text.strip()}, {name} is {exact}"
    return None


def wrong_numbers(page: Path, root: Path) -> list[str]:
    """Marked numbers of a page that are not what the results file says."""
    text = page.read_text()
    markers = MARKER.findall(text)
    problems = [
        f"{file} {pairs}: {problem}"
        for file, pairs, printed in markers
        if (problem := check_marker(root, file, pairs, printed)) is not None
    ]
    if text.count("<!-- from ") != len(markers):
        problems.append("a marker is not of the form <!-- from FILE ... -->NUMBER<!-- -->")
    return problems


@pytest.mark.parametrize("page", PAGES)
def test_numbers_are_those_of_their_results_files(page: str) -> None:
    assert wrong_numbers(ROOT / page, ROOT) == []


@pytest.mark.parametrize(
    ("pairs", "printed", "problem"),
    [
        ("policy=hess setting=0.8,0.4 metric=auc_30", "0.512", None),
        ("policy=hess setting=0.8,0.40 metric=auc_30", "0.51", None),
        ("policy=hess setting=0.8,0.4 metric=auc_30*100", "51.2 %", None),
        ("policy=hess setting=0.8,0.4 metric=auc_30*100", "51.2 ± 0.9", None),
        ("policy=hess setting=0.8,0.4 metric=gain*100", "−7.7", None),
        ("policy=hess setting=0.8,0.4 metric=gain*100", "+7.7", "says"),
        ('variant="two words" metric=errors.ate', "+2", None),
        ("policy=hess setting=0.8,0.4 metric=auc_30", "0.513", "says 0.513, auc_30 is 0.512"),
        ("policy=hess setting=0.8,0.4 metric=auc_30", "0.512 ± 0.1", "auc_30_se is 0.0"),
        ("policy=hess setting=0.8,0.4 metric=auc_30", "half", "is no number"),
        ("policy=hess setting=0.8,0.4 metric=auc_3", "0.512", "no number 'auc_3'"),
        ("policy=hess setting=0.8,0.4 metric=dirty", "1", "no number 'dirty'"),
        ("policy=hess setting=0.8,0.4", "0.512", "no number ''"),
        ("policy=hess metric=auc_30", "0.512", "2 rows"),
        ("policy=uniform metric=auc_30", "0.512", "0 rows"),
    ],
)
def test_the_number_checker(tmp_path: Path, pairs: str, printed: str, problem: str | None) -> None:
    rows = [
        {"policy": "hess", "sparse_ratio": 0.8, "cdf_threshold": 0.4, "auc_30": 0.51249}
        | {"auc_30_se": 0.0087, "gain": -0.0771, "dirty": True},
        {"policy": "hess", "sparse_ratio": 0.9, "cdf_threshold": 0.2, "auc_30": 0.4},
        {"variant": "two words", "errors": {"ate": 2.3}},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "page.md"
    page.write_text(f"It is <!-- from rows.jsonl {pairs} -->{printed}<!-- -->, we find.")
    found = wrong_numbers(page, tmp_path)
    assert len(found) == (problem is not None)
    if problem is not None:
        assert problem in found[0]


def test_the_number_checker_wants_files_and_whole_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- from none.jsonl policy=hess metric=auc_30 -->0.5<!-- -->")
    assert wrong_numbers(page, tmp_path) == ["none.jsonl policy=hess metric=auc_30: no such file"]
    page.write_text("<!-- from none.jsonl metric=a -->0.5 and <!-- from none.jsonl -->0.5")
    assert len(wrong_numbers(page, tmp_path)) == 1


def test_tables_are_those_of_their_results_files() -> None:
    command = [sys.executable, ROOT / "experiments" / "tables.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Whose machine


def test_no_path_of_a_developers_machine() -> None:
    assert MACHINE_PATH.search("at /home/" + "ada") is not None
    assert MACHINE_PATH.search("src/root/x ~/root/x") is None
    folders = ("docs", "src", "tests", "experiments", "results")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    suffixes = {".md", ".py", ".toml", ".json", ".jsonl", ".txt", ""}
    named = []
    for path in files:
        if path.is_file() and path.suffix in suffixes and "egg-info" not in str(path):
            found = MACHINE_PATH.search(path.read_text(errors="replace"))
            named += [f"{path.relative_to(ROOT)}: {found[0]}"] if found else []
    assert named == []
