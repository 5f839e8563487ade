"""What the pages say about each claim: a title, and the terms a reader needs."""

TITLES = {
  "variance_inverse_b": "Gradient noise",
  "direction_stable": "Gradient direction",
  "oscillation": "Oscillation",
  "more_steps": "Steps to target",
  "generalizes": "Generalisation",
  "flat_minima": "Flatness",
  "throughput": "Throughput",
  "linear_scaling": "Learning rate",
  "noise_grows": "Growth",
  "temperature": "Temperature",
  "estimators_agree": "Estimators",
  "layernorm_predicts_total": "Normalisation layers",
  "coverage": "Coverage",
}

EXPLANATIONS = {
  "variance_inverse_b": "A minibatch gradient is a noisy estimate of the gradient over all training examples; its variance is the "
  "sum, over all parameters, of its squared scatter around that full gradient.",
  "direction_stable": "The cosine is 1 where the minibatch gradient points exactly along the full gradient, and 0 where it points "
  "in an unrelated direction.",
  "oscillation": "The trend is a moving mean of the training loss; the spread is the standard deviation of a single minibatch's loss "
  "around it, as a fraction of it.",
  "more_steps": "One step is one update of the parameters. Under perfect scaling twice the batch needs half the steps; the critical "
  "batch size is where that stops, and S_min is the number of steps that no batch, however large, can go below.",
  "generalizes": "At equal epochs every batch size sees the same number of examples, so large batches make fewer updates; at equal "
  "steps every batch size makes the same number of updates, so large batches see more examples.",
  "flat_minima": "Sharpness is the largest eigenvalue of the Hessian, the curvature of the training loss in its steepest direction, "
  "at the end of training; a flat minimum has a small one. The residual says how far the eigenvalue may be off.",
  "throughput": "Throughput is how many training examples this machine processes in a second; the knee is where a larger batch stops "
  "paying for itself.",
  "linear_scaling": "The best rate is the one that reached the target in the fewest steps, refined between the points of the grid; a "
  "hollow mark lies on the edge of its grid, so that the true best may lie beyond.",
  "noise_grows": "The noise scale tr(Sigma)/|G|^2 is the batch size, in examples, at which the noise of a minibatch gradient is as "
  "large as the gradient itself. Its Hessian form tr(H Sigma)/(G'HG) also weighs each direction by its curvature and so predicts "
  "the progress of a step; the form in Adam's metric is a heuristic. A hollow mark is a measurement that does not identify the noise "
  "scale for unseen data.",
  "temperature": "The temperature is learning rate / batch size. In the middle of training it is lowered in three ways, and once rate and "
  "batch size are changed so that it stays as it was; then all changes are undone. The prediction takes batches to be independent, so here "
  "they are drawn with replacement; in shuffled epochs their noise cancels, and slow training at a low temperature is quieter than "
  "predicted.",
  "estimators_agree": "Exact: all per-example gradients. Ghost: their norms from one backward pass. Microbatch and device: from the norms "
  "of small and large batches, which gradient accumulation and data parallelism compute in passing.",
  "layernorm_predicts_total": "The parameters of normalisation layers are few, and the norms of their per-example gradients nearly free.",
  "coverage": "Intervals at the 95 % level, computed for many draws of data whose noise scale is known: how often they contain it.",
}
