"""The example's captions: what the grammar writes, its tokens, and the parser that reads any text.

Shape letters: N captions, P = 5 places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.te_vqgan.data.caption_parser import parse
from examples.te_vqgan.data.caption_tokens import CaptionTokenizer
from examples.te_vqgan.data.captions import STYLES, Grammar, class_spellings, split_words
from examples.te_vqgan.data.recipes import COLORS, EMPTY, LAYOUTS, PLACES, sample_recipes
from tests.helpers import numpy_generator

DIGITS = tuple("0123456789")
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CASES = list(product((DIGITS, GARMENTS), STYLES))
# Whose vocabulary and length follow from the grammar.
OWN_SIZES = [case for case in CASES if case[1] != "numerals"]
GRAMMARS = {case: Grammar(*case) for case in CASES}
TOKENIZERS = {case: CaptionTokenizer(grammar) for case, grammar in GRAMMARS.items()}
SEEDS = st.integers(0, 2**63)
UL, UR, LL, LR, CENTRE = range(5)
WHITE, RED, GREEN, BLUE = range(4)

cases = pytest.mark.parametrize("case", CASES, ids=[f"{names[0]}-{style}" for names, style in CASES])
own_sizes = pytest.mark.parametrize("case", OWN_SIZES, ids=[f"{names[0]}-{style}" for names, style in OWN_SIZES])


def scenes(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes and colours of random images of all layouts."""
    recipe = sample_recipes(np.arange(10), count, np.random.default_rng(seed), layouts=LAYOUTS)
    return recipe.digits.astype(np.int64), recipe.colors


def scene(**digits: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Classes and colours by place: ``scene(UL=(2, WHITE))``."""
    classes, colors = [EMPTY] * len(PLACES), [EMPTY] * len(PLACES)
    for place, (label, color) in digits.items():
        classes[globals()[place]], colors[globals()[place]] = label, color
    return classes, colors


def read(
    caption: str, names: tuple[str, ...] = DIGITS, default_place: int | None = None
) -> tuple[list[int], list[int]]:
    """What the parser reads in one caption."""
    classes, colors = parse([caption], names, default_place=default_place)
    return classes[0].tolist(), colors[0].tolist()


def chi_square(counts: np.ndarray) -> float:
    """Pearson's statistic against equal shares."""
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


# grammar ---------------------------------------------------------------------------------------------------


def test_the_papers_caption_is_among_the_written() -> None:
    """The paper's example of two clauses is written under one of the scene's numbers, word for word, and read."""
    paper = "the lower right is blue nine, and the white two is on the upper left."
    grammar, (classes, colors) = GRAMMARS[DIGITS, "full"], scene(LR=(9, BLUE), UL=(2, WHITE))
    first, second = grammar.clauses(2, UL, WHITE), grammar.clauses(9, LR, BLUE)
    chosen = first.index("the white two is on the upper left")
    chosen += len(first) * second.index("the lower right is blue nine")
    # What is left of a number are 2 orders, 3 joiners and 2 endings.
    numbers = chosen + len(first) * len(second) * np.arange(12)
    written = grammar.write_numbered(np.array([classes] * 12), np.array([colors] * 12), numbers)
    assert len(set(written)) == 12
    assert paper in written
    assert read(paper) == scene(LR=(9, BLUE), UL=(2, WHITE))


@cases
def test_every_clause_says_its_digit(case: tuple) -> None:
    """All templates, synonyms and spellings, for all combinations, are read back as what they were written for."""
    names, style = case
    grammar = GRAMMARS[case]
    assert len(set(grammar.templates)) == len(grammar.templates) >= {"terse": 3}.get(style, 6)
    texts, expected = [], []
    for label, place, color in product(range(10), range(len(PLACES)), range(len(COLORS))):
        clauses = grammar.clauses(label, place, color)
        distinct = len(set(clauses))
        synonyms = 2 * (2 if names == DIGITS and style != "numerals" else 1)
        per_template = [synonyms * (2 if "{at}" in template else 1) for template in grammar.templates]
        wordless = place == grammar.default_place
        assert distinct == (len(clauses) if wordless else sum(per_template)) >= len(grammar.templates)
        texts += clauses
        expected += [(label, place, color)] * len(clauses)
    classes, colors = parse(texts, names, default_place=grammar.default_place)
    label, place, color = np.array(expected).T
    image = np.arange(len(texts))
    assert (classes[image, place] == label).all()
    assert (colors[image, place] == color).all()
    assert ((classes != EMPTY).sum(axis=1) == 1).all()
    assert ((colors != EMPTY).sum(axis=1) == 1).all()
    # A negative control: with the names in another order no class is read as itself.
    wrong = parse(texts, names[1:] + names[:1], default_place=grammar.default_place)[0]
    assert (wrong[image, place] != label).all()


@cases
@settings(deadline=None, max_examples=40)
@given(seed=SEEDS)
def test_written_captions_are_read_back(case: tuple, seed: int) -> None:
    """Reading is the inverse of writing, also through tokens; labels moved among the places are noticed."""
    names, _ = case
    classes, colors = scenes(seed, 50)
    captions = GRAMMARS[case].write(classes, colors, np.random.default_rng(seed))
    tokenizer = TOKENIZERS[case]
    assert tokenizer.decode(tokenizer.encode(captions)) == captions
    default_place = GRAMMARS[case].default_place
    read_classes, read_colors = parse(captions, names, default_place=default_place)
    assert read_classes.dtype == np.int64
    assert read_colors.dtype == np.int8
    assert (read_classes == classes).all()
    assert (read_colors == colors).all()

    moved = classes[:, [1, 2, 3, 0, 4]]
    differ = (moved != classes).any(axis=1) & ((moved == EMPTY) == (classes == EMPTY)).all(axis=1)
    written = GRAMMARS[case].write(moved[differ], colors[differ], np.random.default_rng(seed))
    wrong = parse(written, names, default_place=default_place)[0]
    assert (wrong != classes[differ]).any(axis=1).all()


@pytest.mark.slow
@cases
def test_choices_are_uniform_and_independent(case: tuple) -> None:
    """Templates, synonyms, orders, joiners and endings are equally likely, and two clauses are independent."""
    grammar, count = GRAMMARS[case], 20_000
    classes, colors = (
        np.array([row] * count) for row in scene(UL=(1, RED), UR=(2, RED), LL=(3, RED), LR=(4, RED))
    )
    captions = grammar.write(classes, colors, numpy_generator())
    lists = [grammar.clauses(place + 1, place, RED) for place in range(4)]
    known = {text: (place, texts.index(text)) for place, texts in enumerate(lists) for text in texts}
    joiners = sorted(grammar.joiners, key=len, reverse=True)
    orders, joins, ends = Counter(), Counter(), Counter()
    forms = np.zeros((count, 4), int)
    for row, caption in enumerate(captions):
        ends[caption[-1] == "."] += 1
        rest, order, used = caption.rstrip("."), [], []
        while rest:
            text = max((text for text in known if rest.startswith(text)), key=len)
            place, forms[row, known[text][0]] = known[text]
            rest = rest[len(text) :]
            order.append(place)
            if rest:
                used.append(next(joiner for joiner in joiners if rest.startswith(joiner)))
                rest = rest[len(used[-1]) :]
        orders[tuple(order)] += 1
        joins[tuple(used)] += 1
    per_template = len(lists[0]) // len(grammar.templates)
    templates = forms // per_template
    # Below these the statistic stays with a probability of 1 - 1e-7: mean + 6 deviations + 20.
    for counts, kinds in ((orders, 24), (joins, len(grammar.joiners) ** 3), (ends, len(grammar.endings))):
        assert len(counts) == kinds
        assert chi_square(np.array(list(counts.values()))) < kinds + 6 * (2 * kinds) ** 0.5 + 20
    for one, two in permutations(range(4), 2):
        pairs = np.bincount(templates[:, one] * len(grammar.templates) + templates[:, two])
        kinds = len(grammar.templates) ** 2
        assert len(pairs) == kinds
        assert chi_square(pairs) < kinds + 6 * (2 * kinds) ** 0.5 + 20
    # A negative control: a clause paired with itself is as dependent as can be.
    same = np.bincount(templates[:, 0] * (len(grammar.templates) + 1))
    assert chi_square(same) > 1_000
    chosen = np.bincount(forms[:, 0], minlength=len(lists[0]))
    weights = np.array(
        [lists[0].count(text) if lists[0].index(text) == i else 0 for i, text in enumerate(lists[0])]
    )
    assert (chosen[weights == 0] == 0).all()
    shares = chosen[weights > 0] / weights[weights > 0]
    assert shares.min() > 0.5 * count / len(lists[0])
    assert shares.max() < 1.6 * count / len(lists[0])


def test_the_generator_is_the_only_source_of_chance() -> None:
    """Equal generators write equal captions, others others; a number says what is written."""
    grammar = GRAMMARS[DIGITS, "full"]
    classes, colors = scenes(3, 40)
    one, same, other = (grammar.write(classes, colors, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert one == same != other
    numbers = np.random.default_rng(5).integers(2**63, size=40)
    assert grammar.write_numbered(classes, colors, numbers) == one
    assert grammar.write_numbered(classes[::-1], colors[::-1], numbers[::-1]) == one[::-1]


def test_nothing_is_written_of_nothing() -> None:
    """An empty scene has the empty caption, and no scene has none."""
    grammar, nothing = GRAMMARS[DIGITS, "full"], np.full((1, 5), EMPTY)
    assert grammar.write(nothing, nothing, numpy_generator()) == [""]
    assert grammar.write(nothing[:0], nothing[:0], numpy_generator()) == []
    assert TOKENIZERS[DIGITS, "full"].encode([]).shape == (0, 44)
    assert parse([], DIGITS)[0].shape == parse([], DIGITS)[1].shape == (0, 5)
    assert read("") == scene()


def test_numerals_have_words_and_garments_do_not() -> None:
    """Both spellings of a digit are read; other names are only themselves."""
    assert class_spellings(("7", "bag")) == (("7", "seven"), ("bag",))
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    for label, spelling in product(range(10), (DIGITS, words)):
        assert read(f"white {spelling[label]} upper left") == scene(UL=(label, WHITE))
    assert "number" in GRAMMARS[DIGITS, "full"].words
    assert "number" not in GRAMMARS[GARMENTS, "full"].words


@pytest.mark.parametrize("take", [Grammar, lambda names: parse(["white 2 upper left"], names)])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"class_names must be one or more names, got \(\)"),
        ("0123", "class_names must be one or more names, got '0123'"),
        (("Bag",), "class_names must be lower-case words, got 'Bag'"),
        (("a  b",), "class_names must be lower-case words, got 'a  b'"),
        (("a.b",), "class_names must be lower-case words, got 'a.b'"),
        (("",), "class_names must be lower-case words, got ''"),
        (("red bag",), "class_names must be free of the captions' own words, got 'red bag'"),
        (("left",), "class_names must be free of the captions' own words, got 'left'"),
        (("salt and pepper",), "class_names must be free of the captions' own words"),
        (("bag", "bag"), r"class_names must be distinct in all spellings, got \('bag', 'bag'\)"),
        (("2", "two"), "class_names must be distinct in all spellings"),
    ],
)
def test_ambiguous_names_are_refused(
    names: tuple[str, ...], message: str, take: Callable[[tuple[str, ...]], object]
) -> None:
    """Neither the grammar nor the parser takes names that leave a caption in doubt."""
    with pytest.raises(ValueError, match=message):
        take(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"classes": np.zeros((2, 4), int)},
            r"classes and colors must be both \(N, 5\), got \(2, 4\) and \(2, 5\)",
        ),
        (
            {"colors": np.zeros((1, 5), int)},
            r"classes and colors must be both \(N, 5\), got \(2, 5\) and \(1, 5\)",
        ),
        ({"classes": np.array([[10, -1, -1, -1, -1]] * 2)}, r"classes must be in \[-1, 10\), got -1 to 10"),
        ({"classes": np.array([[-2, -1, -1, -1, -1]] * 2)}, r"classes must be in \[-1, 10\), got -2 to 0"),
        ({"colors": np.array([[4, -1, -1, -1, -1]] * 2)}, r"colors must be in \[-1, 4\), got -1 to 4"),
        ({"colors": np.array([[0.0] * 5] * 2)}, "colors must be signed integers, got float64"),
        ({"colors": np.array([[-1, 0, -1, -1, -1]] * 2)}, "classes and colors must be empty in the same places"),
        (
            {"classes": np.zeros((2, 5), int), "colors": np.zeros((2, 5), int)},
            "in quadrants or at the centre, got both",
        ),
        ({"numbers": np.array([1])}, r"numbers must be of shape \(2,\), got \(1,\)"),
        ({"numbers": np.array([1, -1])}, "numbers must be >= 0, got -1"),
        ({"numbers": np.array([1.0, 2.0])}, "numbers must be signed integers, got float64"),
    ],
)
def test_writing_refuses(changes: dict, message: str) -> None:
    """A scene that no image shows has no caption."""
    row = np.array([[0, -1, -1, -1, -1]] * 2)
    arguments = {"classes": row, "colors": row, "numbers": np.array([0, 1]), **changes}
    with pytest.raises(ValueError, match=message):
        GRAMMARS[DIGITS, "full"].write_numbered(**arguments)


def test_an_unknown_style_is_refused() -> None:
    """With the list of those there are."""
    with pytest.raises(ValueError, match="style must be one of 'full', 'terse', 'numerals', got 'verbose'"):
        Grammar(DIGITS, "verbose")


# tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "length"), list(zip(OWN_SIZES, (44, 20, 48, 24), strict=True)))
def test_the_longest_caption_fills_the_tokens(case: tuple, length: int) -> None:
    """No caption is longer, and the longest is reached, in a caption that the grammar does write."""
    grammar, tokenizer, nine = GRAMMARS[case], TOKENIZERS[case], (9, BLUE)
    assert tokenizer.length == length
    classes, colors = (np.array([row] * 30_000) for row in scene(UL=nine, UR=nine, LL=nine, LR=nine))
    longest = max(grammar.write(classes, colors, numpy_generator()), key=lambda text: len(split_words(text)))
    assert len(split_words(longest)) == length - 1
    (tokens,) = tokenizer.encode([longest]).tolist()
    assert tokens.index(tokenizer.end_token) == length - 1
    assert tokenizer.pad_token not in tokens
    by_hand = max(grammar.clauses(9, UL, BLUE), key=split_words_count)
    joined = max(grammar.joiners, key=split_words_count).join([by_hand] * 4) + max(grammar.endings, key=len)
    assert split_words_count(joined) == length - 1
    with pytest.raises(ValueError, match=rf"captions\[1\] must be at most {length - 1} words, got {length}"):
        tokenizer.encode(["", joined + ","])


def split_words_count(text: str) -> int:
    """Words of a text, counted without the module's own expression."""
    return len(text.replace(",", " ,").replace(".", " .").split())


@cases
def test_terse_clauses_are_at_most_five_tokens(case: tuple) -> None:
    """A digit costs the telegram five tokens with its comma, one more where the name has two words."""
    names, style = case
    longest = [
        1
        + max(
            split_words_count(text) for place in range(5) for text in GRAMMARS[case].clauses(label, place, WHITE)
        )
        for label in range(10)
    ]
    extra = np.array([len(name.split()) - 1 for name in names])
    assert (np.array(longest) - extra <= 5).all() == (style == "terse")


@own_sizes
def test_the_vocabulary_is_what_the_grammar_writes(case: tuple) -> None:
    """Every word occurs in some caption, every caption's words are there, and special tokens cannot be written."""
    tokenizer = TOKENIZERS[case]
    classes, colors = scenes(1, 20_000)
    captions = GRAMMARS[case].write(classes, colors, numpy_generator())
    seen = {word for caption in captions for word in caption.replace(",", " ,").replace(".", " .").split()}
    assert seen == set(tokenizer.vocab) - {"<pad>", "<end>"}
    assert len(set(tokenizer.vocab)) == len(tokenizer.vocab) == tokenizer.vocab_size
    assert (tokenizer.pad_token, tokenizer.end_token) == (0, 1)
    assert tokenizer.vocab[:2] == ("<pad>", "<end>")
    with pytest.raises(ValueError, match="got '<end>' in 'red <end>'"):
        tokenizer.encode(["red <end>"])


def test_tokens_are_words_then_end_then_padding() -> None:
    """Commas and full stops are tokens, and the layout is what a model is trained on."""
    tokenizer = TOKENIZERS[DIGITS, "full"]
    tokens = tokenizer.encode(["the centre is red 2.", "this 3, and", ""])
    assert tokens.dtype == torch.int64
    assert tokens.shape == (3, tokenizer.length)
    words = [[tokenizer.vocab[token] for token in row] for row in tokens.tolist()]
    assert words[0][:8] == ["the", "centre", "is", "red", "2", ".", "<end>", "<pad>"]
    assert words[1][:6] == ["this", "3", ",", "and", "<end>", "<pad>"]
    assert words[2] == ["<end>"] + ["<pad>"] * (tokenizer.length - 1)
    assert set(words[0][7:]) == {"<pad>"}


@own_sizes
@settings(deadline=None, max_examples=60)
@given(data=st.data(), width=st.integers(0, 60))
def test_any_tokens_have_a_text_that_can_be_read(case: tuple, data: st.DataObject, width: int) -> None:
    """Whatever a model emits is decoded up to its end token and parsed without an error."""
    tokenizer = TOKENIZERS[case]
    row = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=width, max_size=width))
    (text,) = tokenizer.decode(torch.tensor([row], dtype=torch.int64).reshape(1, width))
    kept = row[: row.index(1)] if 1 in row else row
    assert split_words(text) == [tokenizer.vocab[token] for token in kept if token != 0]
    assert "<" not in text
    classes, colors = parse([text], case[0])
    assert ((classes >= EMPTY) & (classes < 10)).all()
    assert ((colors >= EMPTY) & (colors < 4)).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[45]]), r"tokens must be in \[0, 45\), got 45"),
        (torch.tensor([[3, -1]]), r"tokens must be in \[0, 45\), got -1"),
        (torch.tensor([3]), r"tokens must be \(N, T\), got \(1,\)"),
        (torch.tensor([[0.5]]), "tokens must be integers, got torch.float32"),
        (torch.tensor([[True]]), "tokens must be integers, got torch.bool"),
    ],
)
def test_decoding_refuses_what_is_no_token(tokens: torch.Tensor, message: str) -> None:
    """Other integers are another model's tokens."""
    with pytest.raises(ValueError, match=message):
        TOKENIZERS[DIGITS, "full"].decode(tokens)


@pytest.mark.parametrize("word", ["purple", "upper-left", "The", "10", "item"])
def test_encoding_names_the_unknown_word(word: str) -> None:
    """The message has the caption's number, the word and the caption."""
    text = f"the {word} two"
    message = rf"captions\[1\] must be made of the vocabulary's words, got '{word}' in '{text}'"
    with pytest.raises(ValueError, match=message):
        TOKENIZERS[DIGITS, "full"].encode(["the two", text])


@pytest.mark.parametrize("take", [TOKENIZERS[DIGITS, "full"].encode, lambda text: parse(text, DIGITS)])
def test_one_text_is_not_many(take: Callable[[str], object]) -> None:
    """A lone string is no sequence of captions, though it is a sequence of strings."""
    with pytest.raises(ValueError, match="captions must be a sequence of texts, got 'red'"):
        take("red")


# parser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        # Other orders and words than any template has.
        ("2 white, left upper", scene()),
        ("left upper 2 white", scene(UL=(2, WHITE))),
        ("In the Middle there is a RED Four", scene(CENTRE=(4, RED))),
        ("top right five green and blue 6 bottom left", scene(UR=(5, GREEN), LL=(6, BLUE))),
        # What is missing is empty, and only that.
        ("the upper left is two", scene(UL=(2, EMPTY))),
        ("the upper left is white", scene(UL=(EMPTY, WHITE))),
        ("the white two", scene()),
        ("the white two is on the left", scene()),
        ("the white two is on the upper", scene()),
        ("upper left", scene()),
        # The first counts: of two clauses for a place, and of two words in a clause.
        ("white 2 upper left, red 3 top left", scene(UL=(2, WHITE))),
        ("upper left 2. red 3 top left", scene(UL=(2, EMPTY))),
        ("upper left, red 3 top left", scene(UL=(3, RED))),
        ("white red 2 3 upper left lower right", scene(UL=(2, WHITE))),
        ("white 2 middle upper left", scene(CENTRE=(2, WHITE))),
        # Words within words are other words.
        ("white 22 upper left", scene(UL=(EMPTY, WHITE))),
        ("whitetwo upper left", scene()),
        (",,. and and .", scene()),
    ],
)
def test_parsing_by_hand(caption: str, expected: tuple) -> None:
    """What the rules say of captions outside the grammar."""
    assert read(caption) == expected


def test_names_of_several_words_are_read_whole() -> None:
    """The longest name counts; a part of one is nothing."""
    assert read("white ankle boot upper left", GARMENTS) == scene(UL=(9, WHITE))
    assert read("white boot upper left", GARMENTS) == scene(UL=(EMPTY, WHITE))
    assert read("white ankle, boot upper left", GARMENTS) == scene(UL=(EMPTY, EMPTY))
    assert read("white t-shirt upper left", GARMENTS) == scene(UL=(0, WHITE))
    assert read("white boot lace upper left", ("boot", "boot lace")) == scene(UL=(1, WHITE))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(), max_size=5))
def test_any_text_is_parsed(captions: list[str]) -> None:
    """No text raises, and each is read as if alone."""
    for names in (DIGITS, GARMENTS):
        classes, colors = parse(captions, names)
        assert classes.shape == colors.shape == (len(captions), len(PLACES))
        for row, caption in enumerate(captions):
            assert read(caption, names) == (classes[row].tolist(), colors[row].tolist())


@cases
@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_a_caption_is_read_clause_by_clause(case: tuple, seed: int) -> None:
    """Clauses in reverse are read alike, and a changed word changes what is read at one place only."""
    names, _ = case
    classes, colors = scenes(seed, 20)
    captions = GRAMMARS[case].write(classes, colors, np.random.default_rng(seed))
    for caption, labels, hues in zip(captions, classes.tolist(), colors.tolist(), strict=True):
        clauses = caption.rstrip(".").replace(", and ", " and ").replace(", ", " and ").split(" and ")
        place = GRAMMARS[case].default_place
        assert read(", ".join(reversed(clauses)), names, place) == (labels, hues)
        worse = [clauses[0].replace(COLORS[hue], "pink") for hue in set(hues)]
        for clause in worse:
            if "pink" in clause:
                _, seen = read(" and ".join([clause, *clauses[1:]]), names, place)
                assert sum(a != b for a, b in zip(seen, hues, strict=True)) == 1


# numerals --------------------------------------------------------------------------------------------------

NUMERALS = DIGITS, "numerals"
# Of the tokenizer in the authors' Stage 2, besides special tokens and pieces of words.
AUTHORS_WORDS = {
    *DIGITS,
    *(",", ".", "the", "this", "is", "on", "to", "and", "number"),
    *("upper", "lower", "top", "bottom", "left", "right", *COLORS),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", [DIGITS, GARMENTS], ids=["digits", "garments"])
def test_numerals_of_every_layout_come_back_through_tokens(layout: str, names: tuple[str, ...]) -> None:
    """Grammar, tokens, text, parser; without the default place a digit at the centre is not read."""
    grammar, tokenizer = GRAMMARS[names, "numerals"], TOKENIZERS[names, "numerals"]
    recipe = sample_recipes(np.arange(10), 300, numpy_generator(), layouts=(layout,))
    classes, colors = recipe.digits.astype(np.int64), recipe.colors
    tokens = tokenizer.encode(grammar.write(classes, colors, numpy_generator()))
    texts = tokenizer.decode(tokens)
    found = parse(texts, names, default_place=grammar.default_place)
    assert (found[0] == classes).all()
    assert (found[1] == colors).all()
    bare = parse(texts, names)[0]
    assert (bare == (EMPTY if layout == "centre" else classes)).all()


def test_numerals_have_the_authors_words_and_sizes() -> None:
    """Every word of theirs and no other, one token each; 78 tokens, 50 of them in a caption, a start in front."""
    grammar, tokenizer = GRAMMARS[NUMERALS], TOKENIZERS[NUMERALS]
    assert set(grammar.words) == AUTHORS_WORDS
    assert (tokenizer.vocab_size, len(tokenizer.vocab), tokenizer.length) == (78, 78, 50)
    assert tokenizer.vocab[:3] == ("<pad>", "<end>", "<start>")
    assert (tokenizer.pad_token, tokenizer.end_token, tokenizer.start_token) == (0, 1, 2)
    assert grammar.max_words == 43
    rows = [[tokenizer.vocab[token] for token in row] for row in tokenizer.encode(["this is red 2.", ""]).tolist()]
    assert rows[0][:8] == ["<start>", "this", "is", "red", "2", ".", "<end>", "<pad>"]
    assert rows[1] == ["<start>", "<end>"] + ["<pad>"] * 48
    assert TOKENIZERS[DIGITS, "full"].start_token is None
    joiners = {joiner.strip(" ") for joiner in grammar.joiners}
    assert all(joiner.startswith(",") for joiner in joiners)


def test_numerals_refuse_what_does_not_fit() -> None:
    """More names than the vocabulary has room for, longer ones than the length, and longer captions."""
    names = tuple(f"name{number}" for number in range(60))
    with pytest.raises(ValueError, match="grammar must be names for at most 75 words in all, got 79 words"):
        CaptionTokenizer(Grammar(names, "numerals"))
    with pytest.raises(ValueError, match="grammar must be one with at most 48 words per caption, got 55"):
        CaptionTokenizer(Grammar(("a b c d",), "numerals"))
    with pytest.raises(ValueError, match=r"captions\[0\] must be at most 48 words, got 49"):
        TOKENIZERS[NUMERALS].encode([" ".join(["red"] * 49)])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 77), max_size=60))
def test_any_tokens_of_the_authors_vocabulary_have_a_text(row: list[int]) -> None:
    """Start and padding are left out, and what is not used says nothing."""
    (text,) = TOKENIZERS[NUMERALS].decode(torch.tensor([row], dtype=torch.int64).reshape(1, len(row)))
    kept = row[: row.index(1)] if 1 in row else row
    assert split_words(text) == [TOKENIZERS[NUMERALS].vocab[token] for token in kept if token not in (0, 2)]
    parse([text], DIGITS, default_place=CENTRE)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("this is the red number 4", scene(CENTRE=(4, RED))),
        ("the white 2 is on the left", scene(CENTRE=(2, WHITE))),
        ("the upper left is red 3, and this is blue 4", scene(UL=(3, RED), CENTRE=(4, BLUE))),
        ("this, the red one. 5", scene(CENTRE=(1, RED))),
        (",,. and and . the", scene()),
        ("the upper left is 2", scene(UL=(2, EMPTY))),
    ],
)
def test_a_clause_without_a_place_is_about_the_default_place(caption: str, expected: tuple) -> None:
    """One that says nothing takes nothing away from a later one."""
    assert read(caption, DIGITS, CENTRE) == expected
