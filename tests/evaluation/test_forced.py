"""Right answers given to a tiny model, against its logits."""

from unicode_jax.data import sequences, tasks
from unicode_jax.evaluation import forced


def test_forced_answers_are_those_whose_tokens_are_the_likeliest(
  tiny, make_bench
):
  bench = make_bench(max_images=6)
  held, loaded = bench.sets[1], tiny.model.loaded
  codes = bench.codes(held)

  def likeliest(i, question, answer):
    encoded = sequences.encode_conversation(
      sequences.Conversation(((tasks.show(question), answer),)),
      loaded.text_tokenizer,
      loaded.layout,
      [codes[i]],
    )
    hits = tiny.logits(encoded.token_ids).argmax(-1) == encoded.labels
    return hits[encoded.loss_mask > 0].all()

  # The model has learned little: what it would say counts as right, too.
  asked = held.questions()[:12]
  said = bench.ask(held, [(i, q) for i, q, _ in asked], 8)
  asked = [
    (i, q, text if n % 2 and text else answer)
    for n, ((i, q, answer), text) in enumerate(zip(asked, said, strict=True))
  ]
  expected = [a if likeliest(i, q, a) else "" for i, q, a in asked]
  assert forced.answers(bench, held, asked) == expected
