"""Text for a user who has none: FineWeb's first file, or a small sample."""
import ast
import shutil
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from onecard.documents import FINEWEB
from onecard.files import replace, written_beside
from onecard.settings import UserError, import_package

REPOSITORY = "HuggingFaceFW/fineweb"
FILE = "data/CC-MAIN-2013-20/000_00000.parquet"         # 2 GB
SHORTEST = 200                          # characters; shorter docstrings and topics are left out
NOT_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}


def download_fineweb():
    """Fetch the first file of FineWeb to data/fineweb_one_shard/, unless it is there."""
    if FINEWEB.is_file():
        print(f"{FINEWEB} is already here")
        return
    unfinished = FINEWEB.parent / "download"
    hub = import_package("huggingface_hub", "--download")
    try:
        path = hub.hf_hub_download(REPOSITORY, FILE, repo_type="dataset", local_dir=unfinished)
    except Exception as error:          # many kinds: no network, a full disk
        raise UserError(f"the download of {FILE} failed ({error}); the same command tries again"
                        ) from None
    replace(path, FINEWEB)
    shutil.rmtree(unfinished)


def write_sample(path):
    """Write this Python's documentation as a parquet file."""
    table = pa.table({"text": list(documentation())})
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as beside:
        pq.write_table(table, beside, row_group_size=1000, compression="zstd")


def documentation():
    """Yield the help topics of pydoc, and of each module of the library its docstrings as one text.

    Short ones are left out, and docstrings with sessions (>>>), which are not prose.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:                 # some Linux distributions leave it out
        topics = {}
    yield from (topics[name] for name in sorted(topics) if len(topics[name]) >= SHORTEST)
    library = Path(sysconfig.get_path("stdlib"))
    for source in sorted(library.rglob("*.py")):
        if NOT_DOCUMENTATION.intersection(source.relative_to(library).parts):
            continue
        docstrings = [text for text in docstrings_of(source)
                      if len(text) >= SHORTEST and ">>>" not in text]
        if docstrings:
            yield "\n\n".join(docstrings)


def docstrings_of(source):
    """Yield the docstrings of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield text
