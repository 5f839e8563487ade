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
  "flat_measures": "Flatness by every measure",
  "flat_generalizes": "Flatness and generalisation",
  "sharper_line": "Landscapes",
  "noise_escapes": "Escapes",
  "edge_of_stability": "Edge of stability",
  "no_rule_fits_all": "Scaling rules",
  "warmup_needed": "Warm-up",
  "cosine_helps": "Cosine",
  "lars_lamb_help": "LARS and LAMB",
  "three_regimes": "Steps to result",
  "momentum_extends_scaling": "Momentum",
  "lr_sensitivity": "Sensitivity to the rate",
  "same_best_error": "Quality",
}

EXPLANATIONS = {
  "warmup_needed": "A gradual warm-up raises the learning rate by the same amount at every step, from almost nothing to its peak. The "
  "linear rule multiplies the rate that is best for small batches by the ratio of the batch sizes; it is also shown as it stands, untuned.",
  "cosine_helps": "A cosine decay lowers the learning rate along half a cosine, from its peak to 0 at the end of training.",
  "lars_lamb_help": "LARS and LAMB scale the step of each layer to the size of its weights. The better of the two, and the better of "
  "momentum "
  "and AdamW, are chosen by validation loss, and compared by test error.",
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
  "flat_measures": "Each measure says how fast the training loss rises around a solution: in the steepest direction (eigenvalues), "
  "on average (trace, average sharpness), at worst within a box or ball (Keskar, SAM), or along gradients. Adaptive "
  "ones scale each direction by the weight itself, so that rescaling the layers of a ReLU network does not change "
  "them; the others can be made large or small without changing the function.",
  "flat_generalizes": "Kendall's tau is 1 where the flatter of any two solutions always has the smaller test error, -1 where it always "
  "has the larger one, and 0 where flatness says nothing. It tells what goes together here, not what causes what.",
  "sharper_line": "The line joins the two solutions and goes on beyond both; the curve joins them on an arc. The planes lie along "
  "two random directions, scaled filter by filter to the weights, and along the two directions that explain most of "
  "the way that training took.",
  "noise_escapes": "Training ended at a solution and was continued with another batch size, at that batch size's own rate; the "
  "control continued with the same. What the change did is the difference between the two.",
  "edge_of_stability": "A step of gradient descent overshoots along a direction whose curvature exceeds 2 / learning rate. The largest "
  "curvature of all is the top Hessian eigenvalue; batch sharpness is the curvature that minibatches meet along "
  "their own gradients.",
  "no_rule_fits_all": "A rule carries the best learning rate of batch size b0 to batch size b. What it costs is the steps to the target at "
  "the carried rate, as a multiple of those at the best rate of b; best rates are chosen on other seeds than those that are compared. N is "
  "the noise scale tr(Sigma)/|G|^2 measured at b0. In the maps a cell is a learning rate that was tried, and a cross one at which no seed "
  "arrives within four times the fewest steps.",
  "three_regimes": "Every batch size is tuned by itself, so the curve shows what the batch size does and not what a fixed rate does. "
  "Perfect scaling "
  "means that twice the batch takes half the steps. The fewest steps of a trial count, as in Shallue et al.; the interval tells how "
  "much the "
  "minimum of as many other trials would vary. A trial is cut where it can be no minimum any more.",
  "momentum_extends_scaling": "Momentum adds up gradients and so takes longer steps; what it saves at large batch sizes only is what a "
  "plain rate "
  "cannot reach without becoming unstable.",
  "lr_sensitivity": "A rate is good if it reaches the target within twice the fewest steps of its batch size. With momentum the "
  "effective rate is "
  "the rate / (1 - momentum), the length of a step once the buffer has filled.",
  "same_best_error": "Trials that stop at a target say nothing of what training could reach. So some points were trained on for the "
  "whole budget, and the one that was best on the validation set was trained again with fresh seeds; their test error is read where "
  "the validation set is best.",
}
