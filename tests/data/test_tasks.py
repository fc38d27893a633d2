"""Every task, token by token, in every template; and what is drawn at random.

Sequences are written as `WordTokenizer.read` reads them: `!` is learned by the
loss, `#` is learned too and a code of a drawn image, `1+2` is one position.
"""

import collections
import itertools

from hypothesis import given, strategies as st
import numpy as np
import pytest

from unicode_jax.data import sequences, sources, tasks
from unicode_jax.data.sequences import Conversation, ImageSpan

# P = 4 positions of D = 2 codes.
CODES = np.arange(101, 109, dtype=np.int32).reshape(4, 2)
READ = "<image> 101+102 103+104 105+106 107+108 </image>"
DRAWN = "!<image> #101 #102 #103 #104 #105 #106 #107 #108 !</image>"

DIALOGUE = (("What is it?", "a dot"), ("Sure?", "yes , sure"), ("Why?", "red"))
SAID = sources.Annotation(
  captions=("a red dot",),
  dialogues=((("Is it red?", "yes"),), (("Or blue?", "no"),), DIALOGUE),
  label="dot",
)
TALK = Conversation((("Hi there", "hello"), ("Bye", "see you")))

PREAMBLE = (
  "<s> A chat between a curious user and an artificial intelligence assistant. "
  "The assistant gives helpful, detailed, and polite answers to the user's "
  "questions. "
)

PLAIN = {
  "decompression": (
    r"<s> User : <image> 101+102 103+104 </image> \nAssistant :"
    " !<image> #101 #102 #103 #104 !</image> !</s>"
    r" User : <image> 105+106 107+108 </image> \nAssistant :"
    " !<image> #105 #106 #107 #108 !</image> !</s>"
  ),
  "caption": (
    rf"<s> User : {READ} what is in the image? \nAssistant :"
    " !a !red !dot !</s>"
  ),
  "vqa": (
    rf"<s> User : {READ} Is it red? \nAssistant : !yes !</s>"
    r" User : Or blue? \nAssistant : !no !</s>"
  ),
  "described": (
    r"<s> User : a red dot. Is it red? \nAssistant : !yes !</s>"
    r" User : Or blue? \nAssistant : !no !</s>"
  ),
  "dialogue": (
    rf"<s> User : {READ} What is it? \nAssistant : !a !dot !</s>"
    r" User : Sure? \nAssistant : !yes !, !sure !</s>"
    r" User : Why? \nAssistant : !red !</s>"
  ),
  "text_to_image": (
    rf"<s> User : Draw : a red dot \nAssistant : {DRAWN} !</s>"
  ),
  "class_conditional": (
    rf"<s> User : Draw one of : dot \nAssistant : {DRAWN} !</s>"
  ),
  "unconditional": (rf"<s> User : Draw a picture. \nAssistant : {DRAWN} !</s>"),
  "text": (
    r"<s> User : Hi there \nAssistant : !hello !</s>"
    r" User : Bye \nAssistant : !see !you !</s>"
  ),
}
VICUNA = {
  "decompression": (
    f"{PREAMBLE} USER : <image> 101+102 103+104 </image> ASSISTANT :"
    " !<image> #101 #102 #103 #104 !</image> !</s>"
    " USER : <image> 105+106 107+108 </image> ASSISTANT :"
    " !<image> #105 #106 #107 #108 !</image> !</s>"
  ),
  "caption": (
    f"{PREAMBLE} USER : {READ} what is in the image? ASSISTANT :"
    " !a !red !dot !</s>"
  ),
  "vqa": (
    f"{PREAMBLE} USER : {READ} Is it red? ASSISTANT : !yes !</s>"
    " USER : Or blue? ASSISTANT : !no !</s>"
  ),
  "described": (
    f"{PREAMBLE} USER : a red dot. Is it red? ASSISTANT : !yes !</s>"
    " USER : Or blue? ASSISTANT : !no !</s>"
  ),
  "dialogue": (
    f"{PREAMBLE} USER : {READ} What is it? ASSISTANT : !a !dot !</s>"
    " USER : Sure? ASSISTANT : !yes !, !sure !</s>"
    " USER : Why? ASSISTANT : !red !</s>"
  ),
  "text_to_image": (
    f"{PREAMBLE} USER : Draw : a red dot ASSISTANT : {DRAWN} !</s>"
  ),
  "class_conditional": (
    f"{PREAMBLE} USER : Draw one of : dot ASSISTANT : {DRAWN} !</s>"
  ),
  "unconditional": (
    f"{PREAMBLE} USER : Draw a picture. ASSISTANT : {DRAWN} !</s>"
  ),
  "text": (
    f"{PREAMBLE} USER : Hi there ASSISTANT : !hello !</s>"
    " USER : Bye ASSISTANT : !see !you !</s>"
  ),
}
# ChatML: "\\nDraw" is one word here, as nothing parts it from the template. The
# question's own end is not learned, the answer's is; the line break behind that
# is not, and is left out at the very end.
CHATML = {
  "decompression": (
    r"<|im_start|> user \n <image> 101+102 103+104 </image> <|im_end|> \n"
    r" <|im_start|> assistant \n !<image> #101 #102 #103 #104 !</image>"
    r" !<|im_end|> \n"
    r" <|im_start|> user \n <image> 105+106 107+108 </image> <|im_end|> \n"
    r" <|im_start|> assistant \n !<image> #105 #106 #107 #108 !</image>"
    r" !<|im_end|>"
  ),
  "caption": (
    rf"<|im_start|> user \n {READ} what is in the image? <|im_end|> \n"
    r" <|im_start|> assistant \n !a !red !dot !<|im_end|>"
  ),
  "vqa": (
    rf"<|im_start|> user \n {READ} Is it red? <|im_end|> \n"
    r" <|im_start|> assistant \n !yes !<|im_end|> \n"
    r" <|im_start|> user \nOr blue? <|im_end|> \n"
    r" <|im_start|> assistant \n !no !<|im_end|>"
  ),
  "described": (
    r"<|im_start|> user \na red dot. Is it red? <|im_end|> \n"
    r" <|im_start|> assistant \n !yes !<|im_end|> \n"
    r" <|im_start|> user \nOr blue? <|im_end|> \n"
    r" <|im_start|> assistant \n !no !<|im_end|>"
  ),
  "dialogue": (
    rf"<|im_start|> user \n {READ} What is it? <|im_end|> \n"
    r" <|im_start|> assistant \n !a !dot !<|im_end|> \n"
    r" <|im_start|> user \nSure? <|im_end|> \n"
    r" <|im_start|> assistant \n !yes !, !sure !<|im_end|> \n"
    r" <|im_start|> user \nWhy? <|im_end|> \n"
    r" <|im_start|> assistant \n !red !<|im_end|>"
  ),
  "text_to_image": (
    r"<|im_start|> user \nDraw : a red dot <|im_end|> \n"
    rf" <|im_start|> assistant \n {DRAWN} !<|im_end|>"
  ),
  "class_conditional": (
    r"<|im_start|> user \nDraw one of : dot <|im_end|> \n"
    rf" <|im_start|> assistant \n {DRAWN} !<|im_end|>"
  ),
  "unconditional": (
    r"<|im_start|> user \nDraw a picture. <|im_end|> \n"
    rf" <|im_start|> assistant \n {DRAWN} !<|im_end|>"
  ),
  "text": (
    r"<|im_start|> user \nHi there <|im_end|> \n"
    r" <|im_start|> assistant \n !hello !<|im_end|> \n"
    r" <|im_start|> user \nBye <|im_end|> \n"
    r" <|im_start|> assistant \n !see !you !<|im_end|>"
  ),
}
WRITTEN = {"plain": PLAIN, "vicuna": VICUNA, "chatml": CHATML}


@pytest.fixture
def source(make_source):
  """Makes a source of images of which the given things are said."""

  def make(*annotations):
    made = make_source("a", len(annotations))
    return sources.ImageSource(made.name, made.path, made.items, annotations)

  return make


def examples(task, source, *, segments=2, questions=2):
  return tasks.image_examples(
    task,
    source,
    positions=len(CODES),
    segments=segments,
    questions_per_image=questions,
  )


@pytest.mark.parametrize("template", WRITTEN)
@pytest.mark.parametrize("task", PLAIN)
def test_token_by_token(word_tokenizer, source, task, template):
  if task == "text":
    (example,) = tasks.text_examples([TALK])
    assert example.item is None
  elif task == "dialogue":
    *_, example = examples("vqa", source(SAID))
  else:
    example, *_ = examples(task, source(SAID))
  layout = sequences.SequenceFormat(sequences.TEMPLATES[template], depth=2)
  encoded = sequences.encode_conversation(
    example.conversation(), word_tokenizer, layout, [CODES]
  )
  word_tokenizer.check(encoded, WRITTEN[template][task])


def test_every_task_is_written_down():
  for written in WRITTEN.values():
    assert set(written) - {"dialogue"} == set(tasks.TASKS)
  drawing = {task for task, written in PLAIN.items() if "#" in written}
  assert drawing == set(tasks.DRAWING)


def test_examples_of_what_is_known(source):
  """One for every image, caption or class; none where nothing is said."""
  silent = sources.Annotation()
  twice = sources.Annotation(captions=("x", "y"), label="z")
  images = source(SAID, silent, twice)
  found = {
    task: [example.item for example in examples(task, images)]
    for task in tasks.TASKS
    if task != "text"
  }
  assert found == {
    "decompression": [0, 1, 2],
    "unconditional": [0, 1, 2],
    "caption": [0, 2, 2],
    "text_to_image": [0, 2, 2],
    "class_conditional": [0, 2],
    "vqa": [0, 0],
    "described": [None, None],
  }
  said = [e.turns[0][1] for e in examples("caption", images)]
  assert said == ["a red dot", "x", "y"]
  asked = [e.turns[0][0] for e in examples("text_to_image", images)]
  assert asked == ["Draw: a red dot", "Draw: x", "Draw: y"]
  with pytest.raises(ValueError, match="no task 'texts'"):
    examples("texts", images)


def test_questions_are_grouped_and_dialogues_stay_whole(source):
  asked = [((f"q{i}", f"a{i}"),) for i in range(7)]
  said = sources.Annotation(dialogues=(*asked[:3], DIALOGUE, *asked[3:]))
  images = source(said, said)
  found = examples("vqa", images, questions=3)
  assert found == examples("vqa", images, questions=3)
  for item in (0, 1):
    *groups, whole = [e for e in found if e.item == item]
    assert whole.turns == DIALOGUE and not whole.independent
    assert [len(group.turns) for group in groups] == [3, 3, 1]
    assert all(group.independent and group.reads for group in groups)
    turns = [turn for group in groups for turn in group.turns]
    assert sorted(turns) == [d[0] for d in asked]
  orders = [[e.turns for e in found if e.item == item] for item in (0, 1)]
  assert orders[0] != orders[1]
  # As the published tests ask: one question a conversation.
  single = examples("vqa", images, questions=1)
  assert sorted(len(e.turns) for e in single) == [1] * 14 + [3] * 2


@given(
  st.integers(1, 40).flatmap(lambda p: st.tuples(st.just(p), st.integers(1, p)))
)
def test_decompression_covers_the_image_once(case):
  positions, segments = case
  spans = tasks.decompression_spans(positions, segments)
  assert len(spans) == segments
  covered = [i for s in spans for i in range(s.start, s.stop)]
  assert covered == list(range(positions))
  lengths = {s.stop - s.start for s in spans}
  assert max(lengths) - min(lengths) <= 1 and min(lengths) >= 1
  # Exact types, as they are compared and pickled.
  assert {type(x) for s in spans for x in (s.start, s.stop)} == {int}


def test_decompression_draws_what_it_reads(source):
  (example,) = examples("decompression", source(SAID), segments=4)
  assert [q for q, _ in example.turns] == [a for _, a in example.turns]
  assert [q for (q,), _ in example.turns] == [
    ImageSpan(0, i, i + 1) for i in range(4)
  ]


@pytest.mark.parametrize("task", ["text_to_image", "class_conditional"])
def test_a_dropped_condition_is_the_unconditional_conversation(source, task):
  images = source(SAID)
  (example,) = examples(task, images)
  (unconditional,) = examples("unconditional", images)
  rng = np.random.default_rng(0)
  drawn = [example.conversation(rng, 0.1) for _ in range(4000)]
  dropped = drawn.count(unconditional.conversation())
  assert dropped + drawn.count(example.conversation()) == len(drawn)
  # Three standard deviations.
  assert abs(dropped / len(drawn) - 0.1) < 3 * (0.09 / len(drawn)) ** 0.5
  for chance, expected in ((0.0, example), (1.0, unconditional)):
    draws = {example.conversation(rng, chance) for _ in range(200)}
    assert draws == {expected.conversation()}


def test_nothing_else_is_dropped_or_reordered(source):
  images = source(SAID)
  rng = np.random.default_rng(0)
  for task in ("decompression", "caption", "unconditional"):
    (example,) = examples(task, images)
    draws = {example.conversation(rng, 1.0) for _ in range(50)}
    assert draws == {example.conversation()}
  *_, dialogue = examples("vqa", images)
  draws = {dialogue.conversation(rng, 1.0) for _ in range(50)}
  assert draws == {dialogue.conversation()}
  (text,) = tasks.text_examples([TALK])
  assert {text.conversation(rng, 1.0) for _ in range(50)} == {TALK}


def test_the_image_stays_before_whatever_question_comes_first(source):
  questions = [((f"q{i}", f"a{i}"),) for i in range(3)]
  said = sources.Annotation(dialogues=tuple(questions))
  (example,) = examples("vqa", source(said), questions=3)
  rng = np.random.default_rng(0)
  draws = {example.conversation(rng) for _ in range(200)}
  expected = {
    Conversation((((ImageSpan(), first[0]), first[1]), *rest))
    for first, *rest in itertools.permutations(q[0] for q in questions)
  }
  assert draws == expected


def test_the_caption_stays_before_whatever_question_comes_first(source):
  questions = [((f"q{i}", f"a{i}"),) for i in range(3)]
  # Captions may be sentences.
  said = sources.Annotation(("a dot.", "red"), dialogues=tuple(questions))
  (example,) = examples("described", source(said), questions=3)
  rng = np.random.default_rng(0)
  draws = {example.conversation(rng) for _ in range(200)}
  expected = {
    Conversation(((f"a dot. {first[0]}", first[1]), *rest))
    for first, *rest in itertools.permutations(q[0] for q in questions)
  }
  assert draws == expected


def test_variants_know_the_longest_that_is_drawn(bpe, source):
  """Tokens that join words make the order and the condition change lengths."""
  layout = sequences.SequenceFormat(depth=2)

  def length(conversation):
    return len(
      sequences.encode_conversation(conversation, bpe, layout, [CODES]).labels
    )

  said = sources.Annotation(
    # "User: a" has a token " a"; "x" takes as many wherever it stands.
    captions=("a",),
    dialogues=tuple(((q, "No."),) for q in ("x", "a", "x y", "x?")),
    label="a",
  )
  rng = np.random.default_rng(0)
  differ = 0
  for task in (
    "vqa",
    "described",
    "text_to_image",
    "class_conditional",
    "caption",
  ):
    for example in examples(task, source(said), questions=4):
      drawn = {example.conversation(rng, 0.5) for _ in range(300)}
      lengths = {length(conversation) for conversation in drawn}
      assert max(lengths) == max(map(length, example.variants()))
      differ += max(lengths) > length(example.conversation())
  assert differ == 2


def test_balancing_leaves_few_answers_that_the_wording_gives_away():
  asked = ("is it red?", "no"), ("is it red?", "yes"), ("what is it?", "dot")
  common, rare, open_ = asked
  # Of 1000 images 900 are not red; "is it big?" has one answer only.
  questions = [
    [rare if i % 10 == 0 else common, open_, ("is it big?", "yes")]
    for i in range(1000)
  ]
  kept = tasks.balanced(questions, 2.0)
  counts = collections.Counter(pair for pairs in kept for pair in pairs)
  assert counts[rare] == 100 and counts[open_] == 1000
  assert counts["is it big?", "yes"] == 1000
  assert 150 < counts[common] < 250  # A hash decides.
  assert kept == tasks.balanced(questions, 2.0)
  for before, after in zip(questions, kept, strict=True):
    assert [pair for pair in before if pair in after] == after
