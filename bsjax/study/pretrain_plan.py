"""What a study of pre-training and fine-tuning trains: two studies of tuned arms, one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bsjax.study.large_batch_plan import ARMS, LargeBatchPlan, check_arms_plan
from bsjax.workloads.transfer import Transfer

PRETRAIN_ARMS = ("adamw_warmup_cosine", "lamb_warmup_cosine")
"""What the advice asks for at large batches: a warm-up, a cosine, and AdamW or LAMB."""
FINETUNE_ARM = "adamw_warmup_cosine"
FINETUNE_BATCH_SIZES = (4, 16, 64, 256, 1024)
MOST_STARTS = 4
"""So many pre-trained networks of a kind are starts of fine-tuning, at most: each seed draws one."""
NOISE_AT = 0.5
"""The gradient noise scale is measured after this part of the pre-training at the reference batch size."""


@dataclass(frozen=True)
class PretrainPlan:
  """Two studies of tuned arms. The reference batch size of the first is the small one, whose networks and those of the largest batch size
  are fine-tuned; `batch_sizes` of a part do not name its reference."""

  pretrain: LargeBatchPlan
  finetune: LargeBatchPlan

  @property
  def settings(self) -> dict[str, Any]:
    """The plan as plain numbers, for the settings of an output folder."""
    parts = {"pretrain": self.pretrain, "finetune": self.finetune}
    return {f"{part}_{name}": value for part, plan in parts.items() for name, value in plan.__dict__.items()}


def make_pretrain_plan(
  transfer: Transfer,
  *,
  batch_sizes: Sequence[int] | None = None,
  finetune_batch_sizes: Sequence[int] | None = None,
  arms: Sequence[str] | None = None,
  num_epochs: float | None = None,
  finetune_epochs: float | None = None,
  num_trials: int | None = None,
  final_seeds: int | None = None,
) -> PretrainPlan:
  """Plans pre-training at the workload's batch sizes and fine-tuning at `FINETUNE_BATCH_SIZES`, each for so many epochs.

  Args:
    batch_sizes: of pre-training, at least two; the smallest is the reference.
    finetune_batch_sizes: at least two.
    arms: of pre-training; the better of them at each batch size counts.
    num_epochs, finetune_epochs: what every batch size sees of either task.
    num_trials, final_seeds: of every search, in both parts.

  Raises:
    ValueError: a number out of range; the message names it.
  """
  first, second = transfer.pretrain, transfer.finetune
  sizes = tuple(batch_sizes or first.preset.batch_sizes)
  fine = tuple(finetune_batch_sizes or [size for size in FINETUNE_BATCH_SIZES if size <= len(second.train)])
  for name, given in (("batch_sizes", sizes), ("finetune_batch_sizes", fine)):
    if len(given) < 2:
      raise ValueError(f"--{name}={','.join(map(str, given))}, wanted at least two, to compare small with large ones")
  shared = {
    "num_trials": 16 if num_trials is None else num_trials,
    "final_seeds": 8 if final_seeds is None else final_seeds,
    "base_learning_rate": first.preset.base_learning_rate,
  }
  pretrain = LargeBatchPlan(
    batch_sizes=sizes[1:],
    arms=tuple(arms or PRETRAIN_ARMS),
    num_epochs=first.preset.num_epochs if num_epochs is None else num_epochs,
    reference_batch_size=sizes[0],
    **shared,  # type: ignore[arg-type]
  )
  finetune = LargeBatchPlan(
    batch_sizes=fine[1:],
    arms=(FINETUNE_ARM,),
    num_epochs=second.preset.num_epochs if finetune_epochs is None else finetune_epochs,
    reference_batch_size=fine[0],
    **shared,  # type: ignore[arg-type]
  )
  if unknown := [arm for arm in pretrain.arms if arm not in ARMS]:
    raise ValueError(f"--arms={','.join(unknown)}, wanted some of {', '.join(ARMS)}")
  check_arms_plan(pretrain, len(first.train))
  check_arms_plan(finetune, len(second.train))
  return PretrainPlan(pretrain, finetune)
