"""Studies of pre-training and fine-tuning with a known answer: records of both parts whose mean losses and errors are given."""

from bsjax.analysis.claims_pretrain import FINETUNE, PRETRAIN
from tests.analysis import simulate_large_batch as simulate

ARMS = ("adamw_warmup_cosine", "lamb_warmup_cosine")
SIZES, FINETUNE_SIZES = (8, 32, 128, 256), (4, 16, 64, 256)
LOSSES = dict.fromkeys(SIZES, 1.0)
"""Mean test losses of pre-training, of AdamW; LAMB's are half as large again."""
ERRORS = dict(zip(FINETUNE_SIZES, (2.0, 2.2, 2.5, 3.0), strict=True))
"""Mean test errors of fine-tuning, in percent."""


def world(
  *,
  losses=LOSSES,
  errors=ERRORS,
  errors_large=None,
  noise=100.0,
  spread=0.01,
  seeds=simulate.SEEDS,
  accuracy=True,
  diverged=None,
  parts=FINETUNE,
  better="adamw_warmup_cosine",
  arms=ARMS,
  start_spread=0.0,
):
  """Returns the description and the records, by part.

  Args:
    losses, errors: by batch size; the batch sizes of `errors` are those of fine-tuning. `errors_large`: of fine-tuning what the largest
      batch size pre-trained, where they differ.
    noise: the noise scale in the middle of pre-training at the smallest batch size, varying by a factor of 1.1; None: not measured.
    spread: standard deviation over seeds, of losses and errors alike.
    diverged: number of final seeds that diverged, by (part, arm, batch size).
    parts: of fine-tuning, that were reached.
    better: the arm with the lowest validation loss, whose losses are `losses`.
    arms: of pre-training.
    start_spread: standard deviation over the pre-trained networks, of which each seed of fine-tuning draws one of four at every batch size.
  """
  diverged = diverged or {}
  records, described = {}, {}
  for part in (PRETRAIN, *parts):
    first = part == PRETRAIN
    of_part = errors_large if part == FINETUNE[1] and errors_large is not None else errors
    sizes, trained = (SIZES, arms) if first else (tuple(of_part), ARMS[:1])
    means = {
      (arm, size): (losses[size] * (1.0 if arm == better else 1.5) if first else of_part[size])
      for size in sizes
      for arm in trained
    }
    records[part], tuned = [], {str(size): {} for size in sizes}
    for (arm, size), mean in means.items():
      finals = []
      for number, seed in enumerate(seeds):
        start = 0.0 if first else start_spread * simulate._luck(part, "start", number % 4)
        lost = number < diverged.get((part, arm, size), 0)
        final = simulate.record(
          "final",
          arm,
          size,
          seed,
          error=mean + start + spread * simulate._luck(part, arm, size, seed),
          state="diverged" if lost else "complete",
          accuracy=accuracy and not first,
        )
        if first and noise is not None and size == min(sizes):
          final.probes.insert(
            0, {"probe": "noise", "step": 1, "dataset_noise_scale": noise * 1.1 ** (number % 2 * 2 - 1)}
          )
        finals.append(final)
      records[part] += [simulate.record("search", arm, size, 0), *finals]
      tuned[str(size)][arm] = {
        "num_steps": simulate.EPOCHS * simulate.TRAIN_SIZE // size,
        "num_trials": 1,
        "num_diverged": 0,
        "point": {"learning_rate": 0.5},
        "edges": {},
        "validation_loss": mean,
        "final": [final.id for final in finals],
      }
    described[part] = {
      "workload": "first" if first else f"second_from_b8_{part}",
      "dataset": "made_up",
      "train_size": simulate.TRAIN_SIZE,
      "validation_size": 200,
      "test_size": simulate.TEST_SIZE,
      "num_params": 100,
      "target": {"metric": "validation_accuracy", "goal": 0.9, "direction": "max"},
      "batch_sizes": list(sizes),
      "arms": {arm: {"optimizer": arm.split("_")[0], "weight_decay": 0.01} for arm in trained},
      "num_epochs": simulate.EPOCHS,
      "num_trials": 16,
      "final_seeds": list(seeds),
      "tuned": tuned,
    }
    if not first:
      described[part]["pretrain_batch_size"] = SIZES[0] if part == FINETUNE[0] else SIZES[-1]
  study = {
    "parts": described,
    "noise_at": 0.5,
    "head": ["Dense_1"],
    "starts": 4,
    "momentum": 0.9,
    "repeats": [4, 3],
    "counts": {"complete": 90, "diverged": 7},
  }
  return study, records
