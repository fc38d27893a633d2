"""The collapse alarm rings late enough, once, and names the right cause."""

from unicode_jax.training import alarm

CONFIG = alarm.AlarmConfig(
  usage_floor=0.1, perplexity_floor=20.0, patience=100, stop=False
)


def metrics(usage, perplexity):
  return {"usage/depth1": usage, "perplexity/depth1": perplexity}


def test_quiet_while_above_both_floors():
  watch = alarm.CollapseAlarm(CONFIG)
  assert all(
    watch.update(step, metrics(0.5, 100.0), "") is None
    for step in range(0, 1000, 50)
  )


def test_rings_after_patience_for_either_measure():
  for low in (metrics(0.01, 100.0), metrics(0.5, 3.0)):
    watch = alarm.CollapseAlarm(CONFIG)
    assert watch.update(50, low, "x") is None
    assert watch.update(100, low, "x") is None
    text = watch.update(150, low, "the cause")
    assert "COLLAPSE at step 150" in text
    assert "since step 50" in text
    assert "the cause" in text


def test_rings_once_per_collapse():
  watch = alarm.CollapseAlarm(CONFIG)
  low = metrics(0.01, 100.0)
  rings = [watch.update(step, low, "x") for step in range(0, 500, 50)]
  assert sum(text is not None for text in rings) == 1
  watch.update(500, metrics(0.5, 100.0), "x")
  rings = [watch.update(step, low, "x") for step in range(550, 1000, 50)]
  assert sum(text is not None for text in rings) == 1


def test_growing_energy_names_the_depth():
  assert alarm.growing_energy([0.5, 0.25], True) is None
  assert "depth 2 adds energy" in alarm.growing_energy([0.5, 0.75], False)
  assert "depth 1 adds energy" in alarm.growing_energy([1.5], True)


def test_recovery_starts_the_count_again():
  watch = alarm.CollapseAlarm(CONFIG)
  watch.update(50, metrics(0.01, 100.0), "x")
  watch.update(100, metrics(0.5, 100.0), "x")
  assert watch.update(180, metrics(0.01, 100.0), "x") is None
  assert watch.below_since == 180


def test_count_survives_a_checkpoint():
  first = alarm.CollapseAlarm(CONFIG)
  first.update(50, metrics(0.01, 100.0), "x")
  second = alarm.CollapseAlarm(CONFIG, first.below_since)
  assert second.update(150, metrics(0.01, 100.0), "x") is not None


def test_not_a_number_counts_as_collapsed():
  watch = alarm.CollapseAlarm(CONFIG)
  watch.update(0, metrics(float("nan"), 100.0), "x")
  assert watch.update(100, metrics(float("nan"), 100.0), "x") is not None


def cause(**changes):
  healthy = dict(
    residual_energy=[0.3, 0.1],
    feature_std=1.0,
    l2_normalize=True,
    code_dim=16,
    paradigm="language_driven",
    code_agreement=0.9,
  )
  return alarm.likely_cause(**(healthy | changes))


def test_causes():
  assert "encoder's output is constant" in cause(feature_std=0.0)
  assert "encoder's output is constant" in cause(feature_std=float("nan"))
  assert "gains follow" in cause(residual_energy=[0.3, 0.5])
  growth = cause(residual_energy=[0.3, 0.5], l2_normalize=False)
  assert "depth 2 adds energy" in growth and "l2_normalize=True" in growth
  assert "depth 1 adds energy" in cause(residual_energy=[1.2, 1.1])
  assert "576 dimensions" in cause(code_dim=576)
  assert "without l2 normalisation" in cause(l2_normalize=False)
  assert "left the LLM's table" in cause(code_agreement=0.1)
  assert "few codes" in cause(code_agreement=0.1, paradigm="frozen")
  assert "few codes" in cause()
  assert "few codes" in cause(code_agreement=None)
