"""The PyTorch opponents of scripts/bench_noise.py: BackPACK and Opacus, on the networks of noise_problems.py.

PyTorch is imported inside functions, so that the benchmark runs without it.
"""

import collections
import sys
from typing import Any

import jax
import numpy as np

from bsjax.probes.leaves import leaf_names
from scripts.noise_problems import HEADS, LENGTH, MLP_RATIO, VOCABULARY, WIDTH, Numbers, Problem, Side, seconds


def torch_network(problem: Problem) -> tuple[Any, dict[str, Any], Any]:
  """Builds the same network; returns it, its parameters by the name of the leaf, and the inputs in its layout."""
  import torch
  from torch import nn

  params = jax.tree.map(np.asarray, problem.params)
  inputs = torch.tensor(np.asarray(problem.examples["image"]))
  layers: collections.OrderedDict[str, nn.Module] = collections.OrderedDict()
  if "tokens" in params:
    network = torch_transformer(tied="logits" not in params)
    inputs = inputs.long()
  else:
    if "Conv_0" in params:
      for number in range(2):
        _, _, fan, features = params[f"Conv_{number}"]["kernel"].shape
        layers[f"Conv_{number}"] = nn.Conv2d(fan, features, 5, padding=2)
        layers |= {f"relu{number}": nn.ReLU(), f"pool{number}": nn.MaxPool2d(2)}
      # Not a permutation: PyTorch would take it for its channels-last layout, in which Opacus 1.6.0 computes norms of zero.
      inputs = inputs.reshape(-1, 1, 28, 28)
      kernel = params["Dense_0"]["kernel"].reshape(7, 7, 64, -1).transpose(2, 0, 1, 3).reshape(7 * 7 * 64, -1)
      params = params | {"Dense_0": params["Dense_0"] | {"kernel": kernel}}
    layers["flatten"] = nn.Flatten()
    dense = [name for name in params if name.startswith("Dense")]
    for name in dense:
      layers[name] = nn.Linear(*params[name]["kernel"].shape)
      if name != dense[-1]:
        layers[f"relu_{name}"] = nn.ReLU()
    network = nn.Sequential(layers)

  flat = dict(zip(leaf_names(params), jax.tree.leaves(params), strict=True))
  by_leaf = {}
  for path, parameter in network.named_parameters():
    stem = path.replace(".", "/").removesuffix("weight")
    leaf = next(name for name in (stem, *(stem + last for last in ("kernel", "scale", "embedding"))) if name in flat)
    value = flat[leaf]
    if leaf.endswith("kernel"):
      value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    with torch.no_grad():
      parameter.copy_(torch.tensor(value))
    by_leaf[leaf] = parameter
  return network, by_leaf, inputs


def torch_transformer(*, tied: bool) -> Any:
  """The network of `language_model`, in PyTorch's usual layers; positions are an embedding of 0, 1, 2, ..."""
  import torch
  from torch import nn
  from torch.nn import functional

  class Attention(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.query, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
      self.key = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Any) -> Any:
      heads = [layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
      return self.out(functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))

  class Block(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.LayerNorm_0, self.LayerNorm_1 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
      self.attention = Attention()
      self.Dense_0, self.Dense_1 = nn.Linear(WIDTH, MLP_RATIO * WIDTH), nn.Linear(MLP_RATIO * WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
      x = x + self.attention(self.LayerNorm_0(x))
      return x + self.Dense_1(functional.gelu(self.Dense_0(self.LayerNorm_1(x)), approximate="tanh"))

  class Network(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
      self.Block_0, self.Block_1 = Block(), Block()
      self.LayerNorm_0 = nn.LayerNorm(WIDTH, eps=1e-6)
      self.logits = nn.Linear(WIDTH, VOCABULARY, bias=not tied)
      if tied:
        self.logits.weight = self.tokens.weight

    def forward(self, tokens: Any) -> Any:
      positions = torch.arange(LENGTH).repeat(len(tokens), 1)  # Opacus wants them contiguous
      x = self.Block_1(self.Block_0(self.tokens(tokens) + self.positions(positions)))
      return self.logits(self.LayerNorm_0(x))

  return Network()


def torch_side(problem: Problem, network: Any, by_leaf: dict[str, Any], inputs: Any, **hooks: Any) -> Side:
  """Runs a network over the chunks, summing losses and gradients.

  Args:
    backward: takes the summed loss of a chunk and makes the backward pass.
    sq_norms: reads |g_i|^2 of the chunk off a parameter.
  """
  import torch
  from torch.nn import functional

  labels = torch.tensor(np.asarray(problem.examples["label"])).long()
  chunks = list(zip(inputs.split(problem.torch_chunk_size), labels.split(problem.torch_chunk_size), strict=True))
  number = len(labels)

  def call() -> tuple[dict[str, Any], dict[str, Any]]:
    network.zero_grad(set_to_none=True)
    norms: dict[str, list[Any]] = {leaf: [] for leaf in by_leaf}
    for chunk, targets in chunks:
      losses = functional.cross_entropy(network(chunk).flatten(0, -2), targets.flatten(), reduction="sum")
      hooks["backward"](losses * len(targets) / targets.numel())
      for leaf, parameter in by_leaf.items():
        norms[leaf].append(hooks["sq_norms"](parameter))
    return norms, {leaf: parameter.grad / number for leaf, parameter in by_leaf.items()}

  def numbers(result: tuple[dict[str, Any], dict[str, Any]]) -> Numbers:
    norms, mean_grad = result
    squares = {f"G {leaf}": float(torch.sum(array.double() ** 2)) for leaf, array in mean_grad.items()}
    return {leaf: torch.cat(some).detach().numpy() for leaf, some in norms.items()} | squares

  return Side(call, numbers)


def backpack_side(problem: Problem) -> Side:
  import torch
  from backpack import backpack, extend
  from backpack.extensions import BatchL2Grad

  network, by_leaf, inputs = torch_network(problem)
  if "Conv_0" in problem.params:  # the faster layout
    network, inputs = network.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)

  def backward(loss: Any) -> None:
    with backpack(BatchL2Grad()):
      loss.backward()

  return torch_side(
    problem, extend(network), by_leaf, inputs, backward=backward, sq_norms=lambda parameter: parameter.batch_l2
  )


def opacus_side(problem: Problem) -> Side:
  from opacus.grad_sample import GradSampleModuleFastGradientClipping

  modes = {}
  for mode in ("fast gradient clipping", "ghost clipping"):
    network, by_leaf, inputs = torch_network(problem)
    wrapped = GradSampleModuleFastGradientClipping(
      network, loss_reduction="sum", use_ghost_clipping=mode == "ghost clipping"
    )
    side = torch_side(
      problem,
      wrapped,
      by_leaf,
      inputs,
      backward=lambda loss: loss.backward(),
      sq_norms=lambda parameter: parameter._norm_sample**2,
    )
    try:
      side.call()
    except (
      NotImplementedError
    ) as error:  # Opacus's own: it has no ghost clipping of tied parameters; its other mode is measured
      print(f"opacus, {mode}: {error}", file=sys.stderr)
    else:
      modes[mode] = min(seconds(side.call) for _ in range(2)), side
  mode = min(modes, key=lambda mode: modes[mode][0])
  return modes[mode][1]._replace(note={"mode": mode})
