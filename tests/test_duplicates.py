import random

import numpy as np
import pytest

import duplicates
from duplicates import PASSAGE, SAMPLES, leaked
from tokenizer import END_OF_TEXT, GPT2Tokenizer

TOKENIZER = GPT2Tokenizer()
WORDS = """time year people way day man thing woman life child world school state family student
group country problem hand part place case week company system program question work government
number night point home water room mother area money story fact month lot right study book eye job
word business issue side kind head house service friend father power hour game line end member law
car city community name president team minute idea kid body information back parent face others
level office door health person art war history party result change morning reason research girl
guy moment air teacher force education""".split()


def sentences(n, seed):
    """n sentences of 12 words, which no other seed gives."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=12)).capitalize() + "." for _ in range(n)]


def prose(n, seed):
    return " ".join(sentences(n, seed))


def write(folder, train, val):
    """The arguments of leaked() for two lists of texts or token ids."""
    for split, documents in (("train", train), ("val", val)):
        ids = [np.array([END_OF_TEXT, *(TOKENIZER.encode(d) if isinstance(d, str) else d)],
                        np.uint16) for d in documents]
        np.concatenate(ids).tofile(folder / f"{split}.bin")
        np.cumsum([0, *map(len, ids)]).astype(np.uint64).tofile(folder / f"{split}.idx")
    return ([folder / "train.bin"], np.fromfile(folder / "val.bin", np.uint16),
            np.fromfile(folder / "val.idx", np.uint64).astype(np.int64))


def found(folder, train, val, **options):
    return leaked(*write(folder, train, val), **options)[0].tolist()


def shares(train_bins, tokens, starts):
    """Of every document of val, the share of all its passages that stand in train (or None)."""
    table = duplicates._classes().tolist()

    def passages(tokens):
        kept = [table[t] for t in tokens if table[t]]
        return [tuple(kept[i:i + PASSAGE]) for i in range(len(kept) - PASSAGE + 1)]
    in_train = set(passages(np.fromfile(train_bins[0], np.uint16).tolist()))
    each = [passages(tokens[a + 1:b].tolist())
            for a, b in zip(starts[:-1], starts[1:], strict=True)]
    return [sum(p in in_train for p in own) / len(own) if own else None for own in each]


@pytest.mark.parametrize("change", [
    str.title,
    str.lower,
    lambda text: text.replace(".", "!!! --"),
    lambda text: text.replace(".", "").replace(",", ""),
    lambda text: text.replace(". ", ".\n\n \t"),
    lambda text: "  \u201c" + text.replace(".", "\u2026 \u2013") + "\u201d",
    lambda text: text.replace("'", "\u2019"),
], ids=["capitals", "small", "marks", "no marks", "white space", "typographic", "apostrophe"])
def test_a_copy_with_other_capitals_white_space_or_punctuation_is_found(tmp_path, change):
    text = prose(15, seed=1).replace(".", ", the children's.")
    assert change(text) != text
    assert found(tmp_path, [prose(9, 2), text, prose(9, 3)], [change(text), prose(15, 4)]) == \
        [True, False]


def test_a_copy_is_found_when_a_third_is_other_text_and_not_when_two_thirds_are(tmp_path):
    text, other = sentences(60, 1), sentences(60, 2)
    third = " ".join(text[:20] + other[:20] + text[40:])
    two_thirds = " ".join(other[:20] + text[20:40] + other[20:40])
    assert found(tmp_path, [prose(9, 3), " ".join(text)], [third, two_thirds]) == [True, False]


def test_halves_of_two_train_documents_make_a_leaked_one(tmp_path):
    first, second = sentences(20, 1), sentences(20, 2)
    val = [" ".join(first[:10] + second[10:]), " ".join(first[:2] + sentences(18, 3))]
    assert found(tmp_path, [" ".join(second), " ".join(first)], val) == [True, False]


def test_a_text_that_stands_twice_in_val_only_has_not_leaked(tmp_path):
    assert found(tmp_path, [prose(30, 1)], [prose(30, 2), prose(30, 2)]) == [False, False]


def test_every_copy_in_val_of_a_train_document_is_found(tmp_path):
    assert found(tmp_path, [prose(30, 1)], [prose(30, 1), prose(9, 2), prose(30, 1)]) == \
        [True, False, True]


def test_no_passage_goes_across_the_border_of_two_train_documents(tmp_path):
    text = TOKENIZER.encode(prose(6, 1))[:PASSAGE + 10]
    halves = [text[:PASSAGE - 1], text[PASSAGE - 1:]]
    assert found(tmp_path, halves, [text]) == [False]
    assert found(tmp_path, [text], [text]) == [True]


def test_a_document_of_one_passage_is_judged_and_a_shorter_one_never_leaks(tmp_path):
    text = [t for t in TOKENIZER.encode(prose(20, 1)) if duplicates._classes()[t]]
    assert found(tmp_path, [text], [text[7:7 + PASSAGE], text[:PASSAGE - 1], [13] * 99, []]) == \
        [True, False, False, False]


@pytest.mark.parametrize("chunk, ahead", [(1, 99), (7, 3), (50, 1), (64, 256), (1000, 5)])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_chunks_and_threads_change_nothing(tmp_path, monkeypatch, chunk, ahead, num_threads):
    monkeypatch.setattr(duplicates, "CHUNK", chunk)
    monkeypatch.setattr(duplicates, "AHEAD", ahead)
    text = [t for t in TOKENIZER.encode(prose(20, 1)) if duplicates._classes()[t]]
    gap = [*text[:30], *[13] * 600, *text[30:]]         # much punctuation within a passage
    # every passage of the text for itself, so that one that is lost at a seam shows
    every = [text[i:i + PASSAGE] for i in range(len(text) - PASSAGE + 1)]
    done = []
    arguments = write(tmp_path, [prose(3, 2), gap, prose(3, 3)], [*every, prose(9, 4)])
    is_leaked, judged = leaked(*arguments, progress=done.append, num_threads=num_threads)
    assert is_leaked.tolist() == [True] * len(every) + [False] and judged.all()
    assert sum(done) == arguments[0][0].stat().st_size // 2


@pytest.mark.parametrize("seed", range(3))
def test_it_says_what_sets_of_all_passages_say(tmp_path, seed):
    rng = random.Random(seed)
    train = [sentences(rng.randrange(1, 40), f"train {seed} {i}") for i in range(30)]
    val = []
    for i in range(60):
        own = sentences(rng.randrange(1, 30), f"val {seed} {i}")
        at, source = rng.randrange(len(own)), rng.choice(train)
        val.append(" ".join(own[:at] + source[:rng.randrange(30)] + own[at:]))
    arguments = write(tmp_path, [" ".join(t) for t in train], val)
    naive = shares(*arguments)
    assert {s is None for s in naive} == {True, False}
    for is_leaked, judged, share in zip(*leaked(*arguments), naive, strict=True):
        assert judged == (share is not None)
        # of a long document SAMPLES passages speak for all; each run has two ends
        if share is None or abs(share - 0.5) >= 2 / SAMPLES or share == 0.5:
            assert is_leaked == (share is not None and share > 0.5)


def test_train_may_come_in_parts(tmp_path):
    text = TOKENIZER.encode(prose(30, 1))
    (train,), tokens, starts = write(tmp_path, [text[:len(text) // 2]], [text, prose(30, 2)])
    train.rename(tmp_path / "one.bin")
    (other,), _, _ = write(tmp_path, [text[len(text) // 2:]], ["x"])
    parts = [tmp_path / "one.bin", other]
    assert leaked(parts, tokens, starts)[0].tolist() == [True, False]
    assert leaked(parts[:1], tokens, starts)[0].tolist() == [False, False]


def test_a_document_of_few_passages_is_judged_by_every_one(tmp_path):
    text = [t for t in TOKENIZER.encode(prose(40, 1)) if duplicates._classes()[t]]
    other = [t for t in TOKENIZER.encode(prose(40, 2)) if duplicates._classes()[t]]
    for n in (2, 3, 9, SAMPLES):                        # passages, k of them from train
        val = [text[:k + PASSAGE - 1] + other[:n - k] for k in range(1, n + 1)]
        assert found(tmp_path, [text], val) == [2 * k > n for k in range(1, n + 1)]


def test_train_or_val_without_a_passage_finds_nothing(tmp_path):
    assert found(tmp_path, ["short"], [prose(20, 1)]) == [False]
    assert found(tmp_path, [prose(20, 1)], ["short", "x"]) == [False, False]


def test_words_share_a_class_exactly_when_their_letters_and_digits_are_the_same():
    table = duplicates._classes()

    def of(text):
        return [int(c) for c in table[TOKENIZER.encode(text)] if c]
    assert of("The") == of(" the") == of("THE") != of("them")
    assert of("2013") != of("2014")
    assert of("\u00e9") == of(" \u00c9") != of("e")
    for nothing in " \t\n.-\u00a0\u2014\u201c\u2019\u2026":
        assert of(nothing) == of(3 * nothing) == [], nothing
    for something in "x7\u0434\u65e5\u0928\U0001f600":
        assert of(something), something
    assert table[END_OF_TEXT] and (table == table[END_OF_TEXT]).sum() == 1
