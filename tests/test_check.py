import json
import re
import shutil

import numpy as np
import pytest

import loader
from check import check
from conftest import documents, write_nanogpt
from loader import END_OF_TEXT, sha256
from tokenizer import GPT2Tokenizer


@pytest.fixture
def folder(tiny):
    """A copy of data/tiny to break."""
    shutil.copytree(tiny / "data" / "tiny", tiny / "copy")
    return tiny / "copy"


def refused(words, folder, kind=ValueError):
    with pytest.raises(kind) as error:
        check(folder)
    assert words in str(error.value) and "\n" not in str(error.value), str(error.value)


def tokens_of(folder, split="train"):
    return np.fromfile(folder / f"{split}.bin", np.uint16)


def starts_of(folder, split="train"):
    return np.fromfile(folder / f"{split}.idx", np.uint64)


def rewrite(folder, tokens=None, starts=None, **told):
    """Replace files of train and make meta.json agree: checksums, counts, and what is `told`."""
    if tokens is not None:
        np.asarray(tokens, np.uint16).tofile(folder / "train.bin")
    if starts is not None:
        np.asarray(starts, np.uint64).tofile(folder / "train.idx")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta["splits"]["train"].update({
        "tokens": len(tokens_of(folder)), "documents": len(starts_of(folder)) - 1,
        "max_token": int(tokens_of(folder).max()), "bin_sha256": sha256(folder / "train.bin"),
        "idx_sha256": sha256(folder / "train.idx"), **told})
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def in_parts(folder, n):
    """Make a whole dataset one of `n` parts, documents in the same order."""
    whole = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    for i in range(n):
        meta = {**whole, "part": [i + 1, n], "splits": {}}
        for split in ("train", "val"):
            tokens, starts = tokens_of(folder, split), starts_of(folder, split)
            ends = np.linspace(0, len(starts) - 1, n + 1).astype(int)
            mine = starts[ends[i]:ends[i + 1] + 1]
            paths = [folder / f"{split}.{i + 1}.{kind}" for kind in ("bin", "idx")]
            tokens[int(mine[0]):int(mine[-1])].tofile(paths[0])
            (mine - mine[0]).tofile(paths[1])
            meta["splits"][split] = {
                "documents": len(mine) - 1, "tokens": int(mine[-1] - mine[0]),
                "text_bytes": whole["splits"][split]["text_bytes"] // n, "max_token": END_OF_TEXT,
                "bin_sha256": sha256(paths[0]), "idx_sha256": sha256(paths[1])}
        (folder / f"meta.{i + 1}.json").write_text(json.dumps(meta), encoding="utf-8")
    for name in ("meta.json", "train.bin", "train.idx", "val.bin", "val.idx"):
        (folder / name).unlink()


def table(out):
    """{row: [its cell of train, of val]} of the printed table."""
    lines = (re.split(r"  +", line.strip()) for line in out.split("\n\n")[0].splitlines()[1:])
    return {cells[0]: cells[1:] for cells in lines}


def naive(folder, split):
    """The lengths of the documents of a split, one token after the other."""
    lengths = []
    for token in tokens_of(folder, split).tolist():
        if token == END_OF_TEXT:
            lengths.append(0)
        lengths[-1] += 1
    return sorted(lengths)


def test_the_numbers_are_those_of_a_naive_count(folder, capsys):
    assert check(folder) is None
    out = capsys.readouterr().out
    assert out.startswith(f"{folder} is whole: sizes, checksums")
    rows = table(out)
    for column, split in enumerate(("train", "val")):
        lengths, cell = naive(folder, split), {name: cells[column] for name, cells in rows.items()
                                               if len(cells) == 2}
        text = [GPT2Tokenizer().decode_bytes(d) for d in np.split(
            tokens_of(folder, split), np.flatnonzero(tokens_of(folder, split) == END_OF_TEXT))[1:]]
        n_bytes = sum(len(t) - len("<|endoftext|>") for t in text)
        assert cell["documents"] == f"{len(lengths):,}"
        assert cell["tokens"] == f"{sum(lengths):,}"
        assert cell["bytes of text"] == f"{n_bytes:,}"
        assert cell["bytes per token (50256 not counted)"] == \
            f"{n_bytes / sum(length - 1 for length in lengths):.2f}"
        for name, share in (("shortest", 0), ("10 %", 0.1), ("median", 0.5), ("90 %", 0.9),
                            ("99 %", 0.99), ("longest", 1)):
            assert cell[name] == f"{lengths[round(share * (len(lengths) - 1))]:,}"
        longest = lengths[-((len(lengths) + 99) // 100):]
        assert cell["share of the longest 1 % of documents"] == \
            f"{100 * sum(longest) / sum(lengths):.1f} %"


def test_columns_are_aligned(folder, capsys):
    check(folder)
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]
    assert len({len(line) for line in lines if not line.startswith("tokens per")}) == 1


def test_a_document_of_each_split_is_shown_as_it_was(folder, capsys):
    check(folder)
    texts, out = documents(300), capsys.readouterr().out
    for split in ("train", "val"):
        shown = re.search(rf"\ndocument ([\d,]+) of {split}, ([\d,]+) tokens:\n(Document 0-\d+: )",
                          out)
        text = next(t for t in texts if t.startswith(shown[3]))
        assert (text[:400] + " [...]" * (len(text) > 400)).replace("\r", "\\r") in out
        number, starts = int(shown[1].replace(",", "")), starts_of(folder, split)
        assert GPT2Tokenizer().decode_bytes(tokens_of(folder, split)[
            int(starts[number]) + 1:int(starts[number + 1])]).decode() == text
        assert int(shown[2].replace(",", "")) == starts[number + 1] - starts[number]


def test_the_documents_shown_differ_from_run_to_run(folder, capsys):
    seen = set()
    for _ in range(8):
        check(folder)
        seen.add(re.search(r"document ([\d,]+) of train", capsys.readouterr().out)[1])
    assert len(seen) > 1


def test_a_document_cannot_harm_the_terminal(work, capsys):
    text = "red \x1b[31m bell \a back\b\r\x7f \x9b2J \u202eturned\ttab\nline 東京"
    write_nanogpt(work / "d", [END_OF_TEXT, *GPT2Tokenizer().encode(text)])
    check(work / "d")
    assert r"red \x1b[31m bell \x07 back\x08\r\x7f \x9b2J \u202eturned" + "\ttab\nline 東京\n" \
        in capsys.readouterr().out


def test_a_long_document_is_cut_after_400_characters(work, capsys):
    write_nanogpt(work / "d", [END_OF_TEXT, *GPT2Tokenizer().encode("🙂𓀀" * 300)])
    check(work / "d")
    assert "tokens:\n" + "🙂𓀀" * 200 + " [...]\n" in capsys.readouterr().out


def test_a_nanogpt_folder_is_read_by_its_50256_and_says_that_nothing_is_verified(folder, capsys):
    check(folder)
    prepared = table(capsys.readouterr().out)
    bare = write_nanogpt(folder.parent / "bare", tokens_of(folder), tokens_of(folder, "val"))
    check(bare)
    out = capsys.readouterr().out
    assert f"{bare} has no meta.json" in out and "no checksums to verify" in out
    assert table(out) == {**prepared, "bytes of text": ["-", "-"],
                          "bytes per token (50256 not counted)": ["-", "-"]}


def test_a_nanogpt_folder_may_end_its_documents_with_50256_or_have_none(work, capsys):
    write_nanogpt(work / "d", [1, 2, END_OF_TEXT, 3, 4, 5, END_OF_TEXT], [7, 8])
    check(work / "d")
    rows = table(capsys.readouterr().out)
    assert rows["documents"] == ["3", "1"] and rows["tokens"] == ["7", "2"]


def test_a_folder_of_characters_is_read_with_its_own_vocabulary(work, capsys):
    import pickle
    letters = "\nabc"
    write_nanogpt(work / "d", [1, 2, 3, 0, 2])
    (work / "d" / "meta.pkl").write_bytes(pickle.dumps(
        {"vocab_size": 4, "itos": dict(enumerate(letters)),
         "stoi": {c: i for i, c in enumerate(letters)}}))
    check(work / "d")
    assert "document 0 of train, 5 tokens:\nabc\nb\n" in capsys.readouterr().out
    write_nanogpt(work / "d", [1, 2, 3, 4, 2])
    refused("has token 4 at place 3, in document 0, but the vocabulary ends with 3", work / "d")
    write_nanogpt(work / "d", [4, 1, 2])
    refused("has token 4 at place 0, in document 0, but", work / "d")


def test_a_missing_folder_is_refused(work):
    refused("there is no folder none; run `python prepare.py`", "none", FileNotFoundError)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "val.bin", "val.idx"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(f"{name} does not exist, but meta.json lists it", folder, FileNotFoundError)


def test_a_missing_file_of_a_nanogpt_folder_is_named(work):
    (write_nanogpt(work / "d", [1, 2]) / "val.bin").unlink()
    refused("val.bin does not exist; run", work / "d", FileNotFoundError)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "val.bin", "val.idx"])
def test_a_file_of_another_size_is_named(folder, name):
    size = (folder / name).stat().st_size
    with open(folder / name, "r+b") as f:
        f.truncate(size - 8)
    refused(f"{name} has {size - 8:,} bytes where meta.json says {size:,}", folder)


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "val.bin", "val.idx"])
def test_one_changed_byte_is_found(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    refused(f"{name} is not the file that prepare.py wrote (its checksum", folder)


def test_files_of_a_nanogpt_folder_that_are_no_tokens_are_refused(work):
    write_nanogpt(work / "d", [1, 2])
    (work / "d" / "val.bin").write_bytes(b"abc")
    refused("val.bin has an odd number of bytes", work / "d")
    (work / "d" / "val.bin").write_bytes(b"")
    refused("val.bin is empty", work / "d")


def test_a_prepare_that_was_stopped_while_renaming_is_told(folder):
    (folder / "meta.json.new").write_text("{}")
    refused("run `python prepare.py` once more", folder)


def test_an_index_that_does_not_span_the_tokens_is_refused(folder):
    starts, n = starts_of(folder), len(tokens_of(folder))
    rewrite(folder, starts=[3, *starts[1:]])
    refused(f"train.idx goes from 3 to {n:,} where the tokens go from 0 to {n:,}", folder)
    rewrite(folder, starts=[*starts[:-1], n + 1])
    refused(f"train.idx goes from 0 to {n + 1:,} where", folder)


@pytest.mark.parametrize("step", [0, -1, 2**63])
def test_an_index_that_does_not_rise_is_refused(folder, step):
    starts = starts_of(folder)
    starts[6] = (int(starts[5]) + step) % 2**64
    rewrite(folder, starts=starts)
    document = 6 if step > 0 else 5
    refused(f"train.idx has document {document} from {starts[document]:,} "
            f"to {starts[document + 1]:,}, which holds no token", folder)


@pytest.mark.parametrize("chunk", [7, 1 << 24])
def test_a_document_that_does_not_begin_with_50256_is_named(folder, monkeypatch, chunk):
    monkeypatch.setattr(loader, "CHUNK", chunk)
    tokens, starts = tokens_of(folder), starts_of(folder)
    tokens[int(starts[9])] = 77
    rewrite(folder, tokens)
    refused(f"document 9 begins with token 77 instead of 50256 (place {starts[9]:,} of ", folder)


@pytest.mark.parametrize("chunk", [7, 1 << 24])
def test_a_50256_inside_a_document_is_named(folder, monkeypatch, chunk):
    monkeypatch.setattr(loader, "CHUNK", chunk)
    tokens, starts = tokens_of(folder), starts_of(folder)
    tokens[int(starts[10]) - 1] = END_OF_TEXT
    rewrite(folder, tokens)
    refused(f"token 50256 stands inside document 9 (place {starts[10] - 1:,} of ", folder)


@pytest.mark.parametrize("chunk", [7, 1 << 24])
@pytest.mark.parametrize("bare", [False, True])
def test_the_first_token_beyond_the_vocabulary_is_named(folder, monkeypatch, chunk, bare):
    monkeypatch.setattr(loader, "CHUNK", chunk)
    tokens, starts = tokens_of(folder), starts_of(folder)
    place = int(starts[21]) - 1
    tokens[place], tokens[-1] = 50257, 60000
    if bare:
        write_nanogpt(folder.parent / "bare", tokens, [1, 2])
    else:
        rewrite(folder, tokens)
    refused(f"train.bin has token 50257 at place {place:,}, in document 20, "
            "but the vocabulary ends with 50256", folder.parent / "bare" if bare else folder)


def test_a_largest_token_that_is_not_metas_is_refused(folder):
    rewrite(folder, max_token=50255)
    refused("train.bin is 50256 where meta.json says 50255", folder)


@pytest.mark.parametrize("chunk", [7, 64, 1 << 24])
@pytest.mark.parametrize("zeros", [64, 1000])
def test_a_zero_tail_is_named(work, monkeypatch, chunk, zeros):
    monkeypatch.setattr(loader, "CHUNK", chunk)
    write_nanogpt(work / "d", [END_OF_TEXT, 0, 5, *[0] * zeros], [1, 2])
    refused(f"train.bin ends with {zeros:,} times token 0 ('!'), as a file does whose writing was "
            "stopped; run `python prepare.py --force`", work / "d")
    write_nanogpt(work / "d", [1, 2], [0] * zeros)
    refused(f"val.bin ends with {zeros:,} times token 0", work / "d")


def test_fewer_than_64_zeros_are_text(work, capsys):
    write_nanogpt(work / "d", [END_OF_TEXT, 0, 5, *[0] * 63], [*[0] * 100, 1])
    check(work / "d")
    assert "times token 0" not in capsys.readouterr().out


def test_a_zero_tail_with_the_right_checksum_is_a_warning(folder, capsys):
    tokens = tokens_of(folder)
    starts = [*starts_of(folder)[:-1], len(tokens) + 80]
    rewrite(folder, [*tokens, *[0] * 80], starts)
    check(folder)
    out = capsys.readouterr().out
    assert re.match(r"warning: .*train.bin ends with 80 times token 0 \('!'\), but its checksum "
                    r"is right, so the last document may end like that\n", out)
    assert "is whole" in out


def test_a_dataset_in_parts_has_the_numbers_of_the_whole(folder, capsys):
    check(folder)
    whole = table(capsys.readouterr().out)
    in_parts(folder, 3)
    check(folder)
    out = capsys.readouterr().out
    assert f"{folder} is whole, in 3 parts:" in out
    parts = table(out)
    for name in whole:
        assert parts[name] == whole[name] or name.startswith("bytes")


def test_a_part_without_documents_of_a_split_is_allowed(folder, capsys):
    in_parts(folder, 40)            # more than val has documents
    assert (folder / "val.1.bin").stat().st_size == 0
    for i in range(1, 41):
        path = folder / f"meta.{i}.json"
        meta = json.loads(path.read_text(encoding="utf-8"))
        meta["splits"]["val"]["max_token"] *= meta["splits"]["val"]["documents"] > 0
        path.write_text(json.dumps(meta), encoding="utf-8")
    check(folder)
    assert "in 40 parts" in capsys.readouterr().out


def test_a_document_shown_from_parts_has_its_number_in_the_whole(folder, capsys):
    train = np.split(tokens_of(folder), starts_of(folder)[1:-1].astype(int))
    in_parts(folder, 5)
    for _ in range(5):
        check(folder)
        shown = re.search(r"\ndocument (\d+) of train, ([\d,]+) tokens:\n(Document 0-\d+: )",
                          capsys.readouterr().out)
        text = GPT2Tokenizer().decode_bytes(train[int(shown[1])][1:]).decode()
        assert text.startswith(shown[3])


def test_a_broken_part_is_named(folder):
    in_parts(folder, 3)
    data = (folder / "train.2.bin").read_bytes()
    (folder / "train.2.bin").write_bytes(data[:-2])
    refused(f"train.2.bin has {len(data) - 2:,} bytes where meta.2.json says {len(data):,}", folder)
    (folder / "train.2.bin").write_bytes(data[:-2] + b"ab")
    refused("train.2.bin is not the file that prepare.py wrote (its checksum is not the one in "
            "meta.2.json)", folder)
    (folder / "train.2.bin").write_bytes(data)
    (folder / "val.3.idx").unlink()
    refused("val.3.idx does not exist, but meta.3.json lists it", folder, FileNotFoundError)


def test_a_missing_part_is_told(folder):
    in_parts(folder, 3)
    (folder / "meta.3.json").unlink()
    refused("lacks part 3 of 3", folder)
