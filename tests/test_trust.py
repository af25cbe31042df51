"""A project from a stranger: whatever it contains, there is one clear sentence, soon, and nothing else."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from conftest import PROJECT
from PIL import Image, PngImagePlugin

from k2cli import pictures
from k2cli.console import sanitize, to_json
from k2cli.fast_toml import dump, parse_long
from k2cli.toml_tables import MAX_FILE_BYTES, Toml, loads
from model import library
from model.board_pictures import read_picture
from model.errors import K2Error
from model.headers import read_header, read_json
from model.references import to_pixels

ROOT = Path(__file__).parents[1]
PATIENCE = 5.0  # seconds of processor time: others may be at work too


@pytest.fixture
def refused(moody, k2, tmp_path) -> Callable[..., str]:
    """A command that soon ends with one sentence and at most one hint, and writes no outputs -> the sentence."""

    def run(*arguments: object) -> str:
        started = time.process_time()
        result = k2(*(arguments or ("render",)), code=1)
        assert time.process_time() - started < PATIENCE
        assert result.stdout == "" and not (moody / "outputs").exists()
        first, *hint = result.stderr.splitlines()
        assert first.startswith("Error: ") and len(hint) <= 1 and all(line.startswith("Hint: ") for line in hint)
        assert not any(ord(sign) < 32 or 127 <= ord(sign) < 160 for sign in first + "".join(hint))
        return first

    return run


def style(moody: Path, text: str) -> None:
    """Write the project's only style and use it."""
    (moody / "styles").mkdir(exist_ok=True)
    (moody / "styles" / "x.toml").write_text(text)
    (moody / "k2.toml").write_text(PROJECT + "[style]\nx = 1.0\n")


@pytest.fixture
def secret(tmp_path) -> Path:
    """A folder beside the project that the project must not see."""
    (tmp_path / "secret").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "secret" / "a.png")
    return tmp_path / "secret"


class TestPaths:
    @pytest.mark.parametrize("path", ["../secret/a.png", "../secret/*", "*/../../secret/*.png", "/etc/*", "refs/../.."])
    def test_outside_references_are_refused(self, moody, refused, secret, path):
        (moody / "refs").mkdir()
        style(moody, f'[[reference]]\nimage = "{path}"\n')

        assert "outside the project" in refused()

    @pytest.mark.parametrize("key", ["model", "lora", "moodboard"])
    def test_other_outside_files_are_refused(self, moody, refused, secret, key):
        if key == "lora":
            style(moody, 'lora = "../secret/a.safetensors"\n')
        else:
            text = '[moodboard]\nimages = ["../secret/*"]\n' if key == "moodboard" else ""
            model = PROJECT.replace("seed = 7", 'seed = 7\nmodel = "../secret"') if key == "model" else PROJECT
            (moody / "k2.toml").write_text(model + text)

        assert "outside the project" in refused()

    @pytest.mark.parametrize("name", ["n" * 300, "d/" * 1500 + "x", "*a" * 600])
    def test_impossible_file_names_are_refused(self, moody, refused, name):
        style(moody, f'[[reference]]\nimage = "{name}"\n')

        assert "long" in refused() or "characters" in refused()


class TestLinks:
    @pytest.mark.parametrize("what", ["file", "folder", "styles", "k2.toml", "lora"])
    def test_links_count_as_their_targets(self, moody, refused, secret, what):
        (moody / "refs").mkdir()
        style(moody, '[[reference]]\nimage = "refs/**/*.png"\n' if what != "lora" else 'lora = "refs/l.safetensors"\n')
        if what == "file":
            (moody / "refs" / "a.png").symlink_to(secret / "a.png")
        elif what == "folder":
            (moody / "refs" / "all").symlink_to(secret)
        elif what == "lora":
            (secret / "l.safetensors").write_bytes(b"precious")
            (moody / "refs" / "l.safetensors").symlink_to(secret / "l.safetensors")
        else:
            (moody / what).rename(secret / what)
            (moody / what).symlink_to(secret / what)

        assert "outside the project" in refused()

    def test_link_to_itself_is_refused(self, moody, refused):
        (moody / "a.png").symlink_to(moody / "a.png")
        style(moody, '[[reference]]\nimage = "a.png"\n')

        assert "leads back to itself" in refused()

    def test_record_replaces_a_link_instead_of_following_it(self, moody, k2, secret):
        k2("render")
        folder = moody / "outputs" / "0001-fox-and-1-more"
        (secret / "precious").write_text("precious")
        (folder / "fox-7.png").unlink()
        (folder / "fox-7.toml").unlink()
        (folder / "fox-7.toml").symlink_to(secret / "precious")

        k2("render", "--resume")

        assert (secret / "precious").read_text() == "precious" and not (folder / "fox-7.toml").is_symlink()

    @pytest.mark.parametrize("kind", ["link", "pipe", "postscript"])
    def test_sheet_shows_no_picture_from_elsewhere(self, moody, k2, secret, kind):
        k2("render")
        folder = moody / "outputs" / "0001-fox-and-1-more"
        for name in ("fox-7.png", "sheet.png"):
            (folder / name).unlink()
        if kind == "link":
            (folder / "fox-7.png").symlink_to(secret / "a.png")
        elif kind == "pipe":
            os.mkfifo(folder / "fox-7.png")
        else:
            (folder / "fox-7.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n")

        result = k2("render", "--resume", code=0 if kind == "pipe" else 1)

        if kind == "pipe":  # left alone and not waited for; the sheet has an empty place for it
            assert (folder / "fox-7.png").is_fifo() and (folder / "sheet.png").is_file()
        else:
            assert "outside" in result.stderr or "not a readable picture" in result.stderr
            assert not (folder / "sheet.png").exists()


class TestCode:
    @pytest.mark.skipif("mini" not in library.bundled_models(), reason="the box holds no weights yet")
    @pytest.mark.parametrize("way", ["workers", "ray"])
    def test_nothing_is_imported_from_a_project(self, tmp_path, way):
        """multiprocessing and Ray start interpreters that would search the current folder first."""
        for name in ("multiprocessing", "random", "struct", "socket", "torch", "numpy", "model", "k2cli"):
            (tmp_path / f"{name}.py").write_text("raise SystemExit(open('ran', 'a').write(f'{__name__}\\n'))\n")
        (tmp_path / "k2.toml").write_text(PROJECT.replace("[render]", "[render]\nsize = '64x64'\nsteps = 1"))
        code = f"import os, sys; sys.path[0] = {str(ROOT)!r}; from k2cli.app import main; main()"
        environment = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}

        with cluster() if way == "ray" else nullcontext() as address:
            done = subprocess.run(
                [sys.executable, "-c", code, "render", "--quiet", f"--{way}", address or "2"],
                cwd=tmp_path,
                env=os.environ | environment,
                capture_output=True,
                text=True,
            )

        assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
        assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr


@contextmanager
def cluster() -> Iterator[str]:
    """A Ray cluster of one node on this machine -> its address."""
    pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        yield nodes.address
    finally:
        nodes.shutdown()


class TestGlobs:
    @pytest.mark.parametrize("pattern", ["refs/**/*.png", "refs/*/*/*/*/*/*/*/*/*/*/*/*/*/*/*/*/*/*/*/*/*.png"])
    def test_cyclic_links_are_followed_once(self, moody, k2, refused, pattern):
        """Two links to their own folder: the number of paths through it doubles with every level."""
        (moody / "refs").mkdir()
        for name in ("a", "b"):
            (moody / "refs" / name).symlink_to(moody / "refs")
        style(moody, f'[[reference]]\nimage = "{pattern}"\n')

        assert "matches no picture" in refused()
        Image.new("RGB", (64, 64)).save(moody / "refs" / "x.png")
        k2("render", "--dry-run")

    def test_glob_over_too_many_files_is_refused(self, moody, refused, monkeypatch):
        monkeypatch.setattr(pictures, "MAX_GLOB_ENTRIES", 50)
        for number in range(60):
            (moody / f"{number}.txt").touch()
        style(moody, '[[reference]]\nimage = "**/*"\n')

        assert "looks at more than 50 files" in refused()

    def test_glob_with_too_many_pictures_is_refused(self, moody, refused):
        for number in range(65):
            Image.new("RGB", (8, 8)).save(moody / f"{number}.png")
        style(moody, '[[reference]]\nimage = "*"\n')

        assert "matches more than 64 pictures" in refused()

    @pytest.mark.parametrize(
        "pattern", ["*.png", "*/*.png", "**/*.png", "**", "a/**", "[ab]/?.png", "a/*/../*.png", "a"]
    )
    def test_globs_match_like_pythons_glob(self, tmp_path, pattern):
        import glob

        for path in ("a/x.png", "a/y.PNG", "b/z.png", "a/deep/w.png", ".hidden/v.png", "u.png", "a/.t.png"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
        pattern_of_files = f"{pattern}/*" if pattern == "a" else pattern
        expected = {
            os.path.normpath(path)
            for path in glob.glob(pattern_of_files, root_dir=tmp_path, recursive=True)
            if path.lower().endswith(".png") and (tmp_path / path).is_file()
        }

        found, _ = pictures.find_pictures(pattern, tmp_path, lambda path, where: tmp_path / path, "here", 99)

        assert {os.path.normpath(path.relative_to(tmp_path)) for path in found} == expected


class TestText:
    @pytest.mark.parametrize("name", ["k2.toml", "styles/x.toml"])
    def test_hundred_megabytes_are_refused(self, moody, refused, name):
        style(moody, 'keywords = ["a"]\n')
        with (moody / name).open("ab") as file:
            file.truncate(100 << 20)

        assert "is larger than 1 MB" in refused()

    def test_pipe_in_place_of_a_style_is_refused(self, moody, refused):
        style(moody, 'keywords = ["a"]\n')
        (moody / "styles" / "x.toml").unlink()
        os.mkfifo(moody / "styles" / "x.toml")

        assert "cannot be read" in refused()

    @pytest.mark.parametrize(
        "text",
        [
            "a." * 400_000 + "a = 1\n",
            "x = {" + "a." * 400_000 + "a = 1}\n",
            "[" + '"a" . ' * 150_000 + "a]\n",
            "x = " + "[" * 500_000,
            "x = " + "{a=" * 200_000,
        ],
        ids=["key", "inline", "header", "lists", "tables"],
    )
    def test_absurd_nesting_is_refused(self, moody, refused, text):
        (moody / "k2.toml").write_text(PROJECT + text)

        assert "k2.toml is n" in refused()  # … nested too deeply, or not valid

    def test_absurdly_nested_record_does_not_stall_the_log(self, moody, k2):
        k2("render", "--no-embed")
        record = moody / "outputs" / "0001-fox-and-1-more" / "fox-7.toml"
        record.write_text(record.read_text() + "[x]\n" + "a." * 400_000 + "a = 1\n")
        started = time.process_time()

        assert "owl" in k2("log").stdout and "fox-7" not in k2("log").stdout
        assert time.process_time() - started < PATIENCE

    def test_long_line_is_searched_quickly(self, moody, refused):
        (moody / "k2.toml").write_text(PROJECT + "[x]\ny = [\n [ 1," + " " * 900_000 + "\n 2 ]\n]\n")

        assert 'line 13: unknown key "x"' in refused()

    def test_too_many_pictures_and_prompts_are_refused(self, moody, refused):
        (moody / "k2.toml").write_text("[render]\nbatch = 1000\n" + '[[prompt]]\ntext="a"\n' * 30)
        assert "more than 10,000 pictures" in refused()

        (moody / "k2.toml").write_text('[[prompt]]\ntext="a"\n' * 40_000)
        assert "more than 20,000 prompts" in refused()

    def test_overlong_prompt_is_refused(self, moody, refused):
        (moody / "k2.toml").write_text(f'[[prompt]]\nname = "a"\ntext = "{"word " * 150_000}"\n')

        assert "longer than 20,000 characters" in refused()


class TestNumbers:
    """TOML's integers have 64 bits; Python's have no limit, and may then be too long to print."""

    @pytest.mark.parametrize("number", ["0x" + "f" * 5000, "9" * 400, "-" + "9" * 400])
    @pytest.mark.parametrize("key", ["seed", "guidance", "mu", "model"])
    def test_huge_numbers_are_refused(self, moody, refused, number, key):
        (moody / "k2.toml").write_text(PROJECT.replace("seed = 7", f"{key} = {number}"))

        assert "more than 64 bits" in refused()

    @pytest.mark.parametrize(
        "line", ["x = 0x" + "f" * 5000, "x = " + "9" * 400, "created = 0001-01-01T00:00:00+23:59", "created = 07:32:00"]
    )
    def test_odd_values_in_a_record_do_not_break_commands(self, moody, k2, line):
        k2("render")
        record = moody / "outputs" / "0001-fox-and-1-more" / "fox-7.toml"
        text = "".join(each for each in record.read_text().splitlines(True) if not each.startswith("created"))
        record.write_text(f"{line}\n{text}")

        for command in (["log"], ["log", "--json"], ["log", "--since", "1d"], []):
            assert "owl" in k2(*command).stdout
        k2("gallery")
        assert "owl" in (moody / "gallery" / "index.html").read_text()
        k2("show", record, code=1 if line.startswith("x") else 0)


class TestChoices:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{a|b}" * 3000, "billions of prompts"),
            ("{" * 15_000, "nested braces"),
            ("{a|" * 5000 + "}" * 5000, "nested braces"),
            ("{" + "a|" * 900 + "}" + "long " * 3600, "characters"),
            ("{" * 900_000, "longer than 20,000 characters"),
        ],
        ids=["many", "open", "deep", "long", "endless"],
    )
    def test_absurd_choices_in_a_prompt_are_refused(self, moody, refused, text, message):
        (moody / "k2.toml").write_text(f'[[prompt]]\ntext = "{text}"\n')

        assert message in refused()

    def test_choices_in_many_prompts_are_limited_together(self, moody, refused):
        text = "{" + "|".join("abcdefghijklmnopqrst") + "}" + "long " * 3900
        (moody / "k2.toml").write_text(f'[[prompt]]\ntext = "{text}"\n' * 45)

        assert "add up to more than 10,000,000 characters" in refused()

    def test_huge_matrix_is_refused(self, moody, refused):
        axes = "".join(f"style.s{number} = [0, 1]\n" for number in range(40))
        (moody / "k2.toml").write_text(f"{PROJECT}[[matrix]]\n{axes}")

        assert "more than 10,000 pictures" in refused()

    def test_oversized_plan_is_refused(self, moody, refused):
        """Thousands of pictures with a thousand references each: either by itself is allowed."""
        Image.new("RGB", (8, 8)).save(moody / "a.png")
        for number in range(16):
            (moody / "styles").mkdir(exist_ok=True)
            text = f'keywords = ["{number}"]\n' + '[[reference]]\nimage = "a.png"\n' * 64
            (moody / "styles" / f"s{number}.toml").write_text(text)
        used = "".join(f"s{number} = 0.1\n" for number in range(16))
        (moody / "k2.toml").write_text(PROJECT.replace("seed = 7", "batch = 1000") + "[style]\n" + used)

        assert "too large to plan" in refused()


class TestPlans:
    @pytest.fixture
    def plan(self, moody, k2) -> Path:
        k2("render")
        return moody / "outputs" / "0001-fox-and-1-more" / "run.toml"

    @pytest.mark.parametrize(
        "more",
        ["[[x]]\n" * 2_000_000, "x = [" + "{}," * 3_000_000 + "]\n", 'x = "' + "\\u0041" * 2_000_000 + '"\n'],
        ids=["tables", "list", "escapes"],
    )
    def test_slow_plan_is_refused_quickly(self, plan, k2, more):
        plan.write_text(plan.read_text() + more)
        started = time.process_time()

        assert "long, and not as k2 writes it" in k2("render", "--resume", code=1).stderr
        assert time.process_time() - started < PATIENCE

    def test_long_plan_written_by_k2_is_read(self, plan):
        """Lists, short tables within lists, quotes and escapes, many times over."""
        table = Toml(plan.read_text(), "plan").table
        words = ["film grain", 'a "b" = {c}', "tab\there", "é", "[x]"]
        look = {"name": "x", "strength": -1e-7, "keywords": words, "avoids": [], "reference": [{"image": "a", "x": 1}]}
        table["picture"] = [each | {"style": [look]} for each in table["picture"] * 2500]

        text = dump(table).decode()

        assert len(text) > MAX_FILE_BYTES and parse_long(text) == loads(text)

    def test_sheet_is_not_mostly_blank(self, plan, k2):
        """Sixty strips of one picture and one of sixty would make a sheet of 3,660 cells."""
        table = Toml(plan.read_text(), "plan").table
        shots = [
            {"prompt": {"name": f"p{i}", "text": f"p{i}", "expanded": "x"}, "settings": {"seed": i}} for i in range(60)
        ]
        shots += [{"prompt": {"name": "q", "text": "q", "expanded": "x"}, "settings": {"seed": i}} for i in range(60)]
        plan.write_bytes(dump(table | {"picture": shots, "sheet": {"columns": 1000}}))

        k2("render", "--resume")

        sheets = list(plan.parent.glob("sheet*.png"))
        assert sheets
        for sheet in sheets:
            with Image.open(sheet) as image:
                assert image.width * image.height < 120_000_000


class TestFolders:
    @pytest.mark.parametrize("name", ["outputs", "outputs/0001", "outputs/0001-fox"])
    def test_pipe_in_place_of_an_output_folder_is_left_alone(self, moody, k2, name):
        """In a process of its own, as it might wait forever."""
        (moody / name).parent.mkdir(exist_ok=True)
        os.mkfifo(moody / name)
        code = "from k2cli.outputs import Run; from pathlib import Path; Run.claim(Path('outputs'), 'x')"

        done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)

        assert done.returncode == 0 or "K2Error: outputs cannot be written: Not a directory" in done.stderr
        assert (moody / name).is_fifo()

    def test_huge_page_in_place_of_a_gallery_is_refused(self, moody, k2):
        k2("render")
        (moody / "gallery").mkdir()
        with (moody / "gallery" / "index.html").open("wb") as file:
            file.truncate(1 << 42)

        assert "other than a k2 gallery" in k2("gallery", code=1).stderr

    @pytest.mark.parametrize("sign", ["\n", "\t", "\x1b[2J", "\udcff"])
    def test_unprintable_file_names_are_not_listed(self, moody, k2, sign):
        """A line break would turn one line into two, and in a pipe the second might name anything."""
        k2("render")
        folder = moody / "outputs" / "0001-fox-and-1-more"
        for path in list(folder.glob("fox-7.*")):
            path.rename(folder / f"fox{sign}7{path.suffix}")
        shutil.copytree(folder, moody / "outputs" / f"0002-a{sign}")

        assert [line.split("\t")[0] for line in k2("log").stdout.splitlines()] == [
            f"outputs/{folder.name}/an-owl-at-night-7.png"
        ]
        assert k2("gallery").stdout == "gallery/index.html\n"
        assert sign not in k2().stdout.replace("\n", "") or sign == "\n"

    def test_current_folder_is_shown_without_control_characters(self, moody, k2, monkeypatch):
        hostile = moody.rename(moody.with_name(ESCAPE))
        monkeypatch.chdir(hostile)

        assert "evil" in k2().stdout and "\x1b" not in k2().stdout and "\x9b" not in k2().stdout

    @pytest.mark.parametrize("sign", ["\x1b[2J", "\udcff"])
    def test_reference_with_an_unrecordable_name_is_refused(self, moody, refused, sign):
        Image.new("RGB", (64, 64)).save(moody / f"a{sign}.png")
        style(moody, '[[reference]]\nimage = "*.png"\n')

        assert ("control character" if sign.isascii() else "is not text in the encoding here") in refused()


class TestStyles:
    @pytest.fixture
    def thousands(self, moody) -> int:
        (moody / "styles").mkdir()
        for number in range(10_000):
            (moody / "styles" / f"s{number}.toml").write_text(f'keywords = ["word {number}"]\n')
        return 10_000

    def test_thousands_of_styles_may_exist_but_not_be_combined(self, moody, k2, refused, thousands):
        used = "".join(f"s{number} = 0.001\n" for number in range(thousands))
        (moody / "k2.toml").write_text(PROJECT + "[style]\n" + used)
        assert "more than 256 styles at once" in refused()

        (moody / "k2.toml").write_text(PROJECT + "[style]\ns17 = 1.0\n")
        assert k2("render", "--dry-run").stdout.count("word 17") == 2

    def test_mix_of_too_many_styles_is_refused(self, moody, refused, thousands):
        style(moody, "[mix]\n" + "".join(f"s{number} = 0.0001\n" for number in range(thousands)))

        assert "more than 256 styles at once" in refused()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of any size that is small on disk."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b"")


def stuffed(kind: str) -> bytes:
    """A picture file that also holds very many things that are not pictures, or one large one."""
    buffer = io.BytesIO()
    image = Image.new("RGB", (64, 64))
    if kind in ("segments", "scans"):
        image.save(buffer, "JPEG", progressive=True)
        data = buffer.getvalue()
        if kind == "segments":
            return data[:2] + b"\xff\xe5\x00\x02" * 16_000_000 + data[2:]
        last = data[data.rindex(b"\xff\xda") : -2]
        return data[:-2] + last * 100 + data[-2:]
    if kind == "xmp":
        image.save(buffer, "WEBP", xmp=b"<a>" + b"<b/>" * (9 << 20) + b"</a>")
        return buffer.getvalue()
    image.save(buffer, "PNG")
    data = buffer.getvalue()
    more = {"size": b"", "chunks": chunk(b"teSt", b"") * 5_000_000, "metadata": chunk(b"teSt", bytes(200 << 20))}
    return data[:33] + more[kind] + data[33:]


class TestPictures:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (bomb(100_000, 100_000), "far too large"),
            (bomb(12_000, 12_000), "has 12000 x 12000 pixels"),
            (bomb(2**31 - 1, 2**31 - 1), "far too large"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n", "not a readable picture"),
            (b"\x89PNG\r\n\x1a\n", "not a readable picture"),
        ],
        ids=["bomb", "large", "absurd", "postscript", "empty"],
    )
    def test_unusable_reference_files_are_refused(self, moody, refused, content, message):
        (moody / "a.png").write_bytes(content)
        style(moody, '[[reference]]\nimage = "a.png"\n')

        assert message in refused()

    def test_pipe_is_not_waited_for(self, moody, refused):
        os.mkfifo(moody / "a.png")
        style(moody, '[[reference]]\nimage = "a.png"\n')
        assert "not a readable picture" in refused()

        (moody / "k2.toml").write_text(PROJECT + '[moodboard]\nimages = ["a.png"]\n')
        assert "is not a picture" in refused()

    @pytest.mark.parametrize("kind", ["size", "chunks", "segments", "scans", "metadata", "xmp"])
    def test_files_that_would_stall_a_decoder_are_refused(self, moody, refused, kind):
        """Each of them is small in an archive, and Pillow would open it."""
        (moody / "a.png").write_bytes(stuffed(kind))
        if kind == "size":
            with (moody / "a.png").open("ab") as file:
                file.truncate(1 << 42)
        style(moody, '[[reference]]\nimage = "a.png"\n')

        assert "is not a readable picture" in refused()
        assert "is not a readable picture" in refused("show", "a.png")
        assert "is not a readable picture" in refused("new", "other", "--from", "a.png")
        for read in (lambda path: to_pixels(path, 64, 64), lambda path: read_picture(path, 64)):
            with pytest.raises(K2Error):
                read(moody / "a.png")

    def test_pictures_as_cameras_write_them_are_accepted(self, tmp_path):
        """JPEGs followed by further ones, progressive ones, animations, sizeable metadata."""
        image = Image.effect_noise((300, 200), 50).convert("RGB")
        image.save(tmp_path / "mpo.jpg", "MPO", save_all=True, append_images=[image])
        image.save(tmp_path / "progressive.jpg", progressive=True, comment=b"x" * 60_000)
        image.save(tmp_path / "moves.webp", save_all=True, append_images=[image.rotate(90)])
        image.save(tmp_path / "moves.png", save_all=True, append_images=[image.rotate(90)])
        image.save(tmp_path / "more.webp", xmp=b" " * (1 << 20), icc_profile=bytes(1 << 20))
        for path in sorted(tmp_path.iterdir()):
            assert pictures.check_picture(path, "here", path.name) == path.suffix[1:]
            assert to_pixels(path, 64, 64).std() > 0

    def test_animation_is_not_decoded_for_its_record(self, moody, refused, monkeypatch):
        """A file of a few megabytes can hold a thousand frames of 64 megapixels each."""
        frames = [Image.new("L", (64, 64), number) for number in range(3)]
        frames[0].save(moody / "a.png", save_all=True, append_images=frames[1:])
        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("it was decoded"))

        assert "has no record" in refused("show", "a.png")

    def test_bomb_is_not_decoded_for_its_record(self, moody, refused):
        (moody / "a.png").write_bytes(bomb(13_000, 13_000))

        assert "not a readable picture" in refused("show", "a.png")

    @pytest.mark.skipif(sys.platform != "linux", reason="the height of memory is Linux's to tell")
    def test_large_picture_takes_little_memory(self, tmp_path):
        """In a process of its own, as memory once taken is not always returned. It starts with its parent's peak, and
        resets it."""
        image = Image.new("RGBA", (5000, 5000), (255, 0, 0, 128))
        image.save(tmp_path / "a.png", compress_level=1)
        code = """if True:
            import re, sys
            from pathlib import Path
            from model.references import to_pixels
            def height():
                return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
            Path("/proc/self/clear_refs").write_text("5")
            before = height()
            pixels = to_pixels(Path(sys.argv[1]), 64, 64)
            assert pixels.shape == (1, 3, 64, 64), pixels.shape
            print((height() - before) >> 10)
        """
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], capture_output=True, text=True)

        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 280  # MiB, for a picture that takes 95 decoded


def lora(header: dict | bytes, data: int = 0) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


class TestWeights:
    @pytest.mark.parametrize(
        "content",
        [
            lora({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, 8),
            lora({"a": {"dtype": "F32", "shape": [-1, -8], "data_offsets": [0, 32]}}, 32),
            lora({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, 8),
            lora({"a": {"dtype": "F32", "shape": [[2]], "data_offsets": [0, 8]}}, 8),
            lora({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 16]}}, 8),
            lora({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, 8),
            lora({"a": {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]}}, 4),
            lora({"a": []}),
            lora({"__metadata__": {"k2": "[" * 100_000}}),
            lora({"__metadata__": {"k2": '{"variant": "distilled"}'}}),
            lora({"__metadata__": {"k2": '{"native": "big"}'}}),
            lora({"__metadata__": {"k2": '{"shapes": "320x192"}'}}),
            lora({"__metadata__": {"k2": '{"shapes": ["320x192", "0x0"]}'}}),
            lora({"__metadata__": {"k2": '{"recommended": [8]}'}}),
            lora({"__metadata__": {"k2": '{"recommended": {"steps": "8"}}'}}),
            lora({"__metadata__": {"k2": '{"recommended": {"guidance": null}}'}}),
            lora({"__metadata__": {"k2": '{"recommended": {"steps": -5}}'}}),
            lora({"__metadata__": {"k2": '{"recommended": {"guidance": -1.0}}'}}),
            lora({"__metadata__": [1]}),
            lora(b"{" * 100_000),
            (2**63).to_bytes(8, "little") + b"{}",
            lora(b"{" + b" " * (17 << 20) + b"}"),
        ],
        ids=range(22),
    )
    def test_absurd_headers_are_refused(self, tmp_path, content):
        (tmp_path / "a.safetensors").write_bytes(content)

        with pytest.raises(K2Error):
            read_header(tmp_path / "a.safetensors")

    def test_lora_of_absurd_shapes_is_refused(self, moody, refused):
        absurd = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}
        (moody / "a.safetensors").write_bytes(lora({"blocks.0.attn.wq.lora_A.weight": absurd}, 8))
        style(moody, 'lora = "a.safetensors"\n')
        assert "is damaged" in refused()

        (moody / "a.safetensors").write_bytes(lora({"\x1b[2J" * 1_000_000: absurd}, 8))
        assert len(refused()) < 3000

    @pytest.mark.parametrize("name", ["a.safetensors", "a.gguf"])
    def test_names_from_a_damaged_file_are_truncated(self, tmp_path, name):
        path, long = tmp_path / name, "x" * 100_000
        if name == "a.gguf":  # one tensor of shape [0]
            path.write_bytes(
                b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, len(long)) + long.encode() + bytes([1]) + bytes(30)
            )
        else:
            path.write_bytes(lora({long: {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4))

        with pytest.raises(K2Error, match=f"damaged.*: {long[:99]}") as error:
            read_header(path)
        assert len(str(error.value)) < len(str(path)) + 300

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_picture_in_place_of_a_lora_gets_a_hint(self, moody, k2, kind):
        Image.new("RGB", (64, 64)).save(moody / "a.safetensors", kind)
        style(moody, 'lora = "a.safetensors"\n')

        said = k2("render", code=1).stderr
        assert ".safetensors and .gguf files only." in said and "incomplete" not in said
        assert kind == "WEBP" or "is a picture." in said

    def test_huge_lora_is_refused(self, moody, refused):
        """The file takes no room on disk, and even less in an archive; its header is valid."""
        whole = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
        head = lora({"blocks.0.attn.wq.lora_A.weight": whole})
        (moody / "a.safetensors").write_bytes(head)
        os.truncate(moody / "a.safetensors", len(head) + 2**40)
        assert read_header(moody / "a.safetensors")
        style(moody, 'lora = "a.safetensors"\n')

        assert "larger than 4 GB" in refused()

    def test_absurd_configs_are_refused(self):
        """A network is built from its config before its tensors are compared."""
        from model.flux_vae import FluxVAEConfig
        from model.text_encoder import QWEN3_VL_4B, TextConfig
        from model.vae import VAEConfig
        from model.vision import VisionConfig

        good = vars(QWEN3_VL_4B)
        assert TextConfig.from_dict(good) == QWEN3_VL_4B
        for key, value in (
            ("num_hidden_layers", 10**9),
            ("hidden_size", 2**40),
            ("vocab_size", "many"),
            ("taps", [-1]),
            ("rms_norm_eps", "small"),
            ("mrope_section", ["a"]),
        ):
            with pytest.raises(K2Error, match="config cannot be used"):
                TextConfig.from_dict({**good, key: value})
        with pytest.raises(K2Error, match="config cannot be used"):
            TextConfig.from_dict(good, taps=5)
        statistics = ({"latents_mean": [0.0]}, {"latents_std": ["one"] * 16})
        sizes = ({"num_res_blocks": 10**9}, {"dim_mult": [1] * 10**6}, {"base_dim": -1}, {"z_dim": None})
        for absurd in (*sizes, *statistics):
            with pytest.raises((ValueError, TypeError)):
                VAEConfig.from_dict(absurd)
        for absurd in ({"layers_per_block": 10**9}, {"block_out_channels": [100, 200]}, {"batch_norm_eps": "x"}):
            with pytest.raises((ValueError, TypeError)):
                FluxVAEConfig.from_dict(absurd)
        names = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "num_position_embeddings")
        seeing = dict.fromkeys(names, 16) | {"num_heads": 4}
        assert VisionConfig.from_dict(seeing).depth == 16
        for key, value in (("depth", 20_000), ("depth", "2"), ("num_heads", 0), ("num_heads", 3), ("patch_size", None)):
            with pytest.raises(K2Error, match="config cannot be used"):
                VisionConfig.from_dict({**seeing, key: value})

    def test_pipe_in_place_of_a_record_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "fox-7.toml")
        code = "import sys; from k2cli.history import load_record; from pathlib import Path; "
        code += "sys.exit(load_record(Path(sys.argv[1])))"

        done = subprocess.run([sys.executable, "-c", code, tmp_path / "fox-7.toml"], timeout=60, capture_output=True)

        assert (done.returncode, done.stderr) == (0, b"")

    @pytest.mark.parametrize("read", [read_header, read_json])
    def test_pipe_is_not_waited_for(self, tmp_path, read):
        os.mkfifo(tmp_path / "a")

        with pytest.raises(K2Error, match="cannot be read"):
            read(tmp_path / "a")


ESCAPE = "\x1b[2J\x9b31m\u202eevil"


class TestControlCharacters:
    @pytest.mark.parametrize("key", ["text", "name", "avoid"])
    def test_prompt_with_control_characters_is_refused(self, moody, refused, key):
        table = {"text": "a fox", key: ESCAPE}
        lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in table.items())
        (moody / "k2.toml").write_text("[[prompt]]\n" + lines)

        assert "contains a control character" in refused()

    @pytest.mark.parametrize("place", ["key", "table", "style", "keyword", "reference"])
    def test_names_are_shown_without_control_characters(self, moody, refused, place):
        quoted = json.dumps(ESCAPE)
        if place in ("keyword", "reference"):
            style(moody, f"keywords = [{quoted}]\n" if place == "keyword" else f"[[reference]]\nimage = {quoted}\n")
        else:
            added = {
                "key": f"[render]\n{quoted} = 1\n",
                "table": f"[{quoted}]\n",
                "style": f"[style]\n{quoted} = 1.0\n",
            }
            (moody / "k2.toml").write_text(added[place] + '[[prompt]]\ntext = "a"\n')

        refused()

    def test_file_names_are_shown_without_control_characters(self, moody, k2, refused):
        (moody / "styles").mkdir()
        (moody / "styles" / f"{ESCAPE}.toml").write_text('keywords = ["a"]\n')
        (moody / "refs").mkdir()
        (moody / "refs" / f"{ESCAPE}.png").write_text("no picture")
        assert k2("style", "list").stdout == ""

        style(moody, '[[reference]]\nimage = "refs/*.png"\n')
        assert "?" in refused()

    def test_project_name_is_shown_without_control_characters(self, moody, k2, monkeypatch):
        hostile = moody.rename(moody.with_name(f"{ESCAPE}"))
        monkeypatch.chdir(hostile)
        (hostile / "k2.toml").write_text('[[prompt]]\ntext = "a"\n')
        k2("render")

        assert "\x1b" not in k2("render", "--resume").stderr

    def test_messages_and_json_escape_control_characters(self):
        assert sanitize(f"a\tb\n{ESCAPE}") == "a\tb\n?[2J?31m?evil"
        text = to_json({"a": f"é {ESCAPE}\n"})
        assert json.loads(text) == {"a": f"é {ESCAPE}\n"}
        assert text.isprintable()
