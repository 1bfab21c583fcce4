"""Labels and predictions of an evaluation -> a report, as JSON and as a table.

Figures that are 0 / 0, such as the recall of a class without examples, are null
and named in `warnings`.
"""
import json

import numpy as np

import atomic_files
from summaries import EVALUATION
from tf_compat import tf

CALIBRATION_BINS = 15


def wilson_interval(right, total, z=1.959964):
  """95 % interval of a share (Wilson 1927): (low, high); none for 0 / 0.

  It stays inside [0, 1] and has a width where all are right, unlike the normal
  approximation.
  """
  if not total:
    return None, None
  share = right / total
  middle = share + z * z / (2 * total)
  half = z * np.sqrt(share * (1 - share) / total + (z / (2 * total))**2)
  scale = 1 + z * z / total
  return (max(0., float((middle - half) / scale)),
          min(1., float((middle + half) / scale)))


def calibration_error(confidences, right, bins=CALIBRATION_BINS):
  """Expected calibration error (arXiv 1706.04599, section 2, equation 3).

  Args:
    confidences: float [N] in [0, 1], probability of the predicted class.
    right: bool [N].
    bins: int, of equal width; each holds its upper end.

  Returns:
    float in [0, 1], mean over examples of |accuracy - confidence| of their bin;
    NaN if a confidence is.
  """
  if not np.isfinite(confidences).all():
    return float('nan')
  index = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
  gap = np.bincount(index, right - confidences, bins)
  return float(np.abs(gap).sum() / max(1, len(right)))


def _ratio(part, whole):
  return float(part / whole) if whole else None


def class_figures(confusion, names):
  """Precision, recall and F1 of each class.

  Args:
    confusion: int [C, C], examples of class i predicted as class j.
    names: list of C str.

  Returns:
    List of dicts, and list of str: what is 0 / 0 and therefore None.
  """
  figures, warnings = [], []
  for i, name in enumerate(names):
    right, true, predicted = (int(n) for n in (
        confusion[i, i], confusion[i].sum(), confusion[:, i].sum()))
    figures.append({
        'class': i, 'name': name, 'examples': true, 'predicted': predicted,
        'precision': _ratio(right, predicted), 'recall': _ratio(right, true),
        'f1': _ratio(2 * right, true + predicted)})
    if not true:
      warnings.append('class %d (%s) has no examples: no recall' % (i, name))
    if not predicted:
      warnings.append('class %d (%s) was never predicted: no precision' %
                      (i, name))
  return figures, warnings


class ReportHook(tf.train.SessionRunHook):
  """Collects labels and predictions while an Estimator evaluates."""

  def __init__(self, class_names, named):
    """Args:
      class_names: list of str, one per logit.
      named: int; logits from here on have no class of their own and are left
        out unless an example or a prediction is there.
    """
    self._names = class_names
    self._named = named

  def begin(self):
    self._tensors = {name: tf.get_collection('evaluation/' + name)[0]
                     for name in EVALUATION if name != 'images'}
    self._confusion = np.zeros([len(self._names)] * 2, np.int64)
    self._confidences, self._right = [], []

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(self._tensors)

  def after_run(self, run_context, run_values):
    batch = run_values.results
    np.add.at(self._confusion, (batch['labels'], batch['classes']), 1)
    self._confidences.append(batch['probabilities'].max(1))
    self._right.append(batch['labels'] == batch['classes'])

  def result(self, evaluation):
    """The figures as a dict that JSON can hold.

    Args:
      evaluation: dict, what Estimator.evaluate returned.
    """
    used = np.flatnonzero(self._confusion.sum(0) + self._confusion.sum(1))
    count = max(min(self._named, len(self._names)),
                used.max() + 1 if len(used) else 0)
    confusion = self._confusion[:count, :count]
    right, total = int(confusion.trace()), int(confusion.sum())
    figures, warnings = class_figures(confusion, self._names[:count])
    numbers = {
        'loss': float(evaluation['loss']),
        'expected_calibration_error': calibration_error(
            np.concatenate(self._confidences).astype(np.float64),
            np.concatenate(self._right))}
    for name in sorted(numbers):
      if not np.isfinite(numbers[name]):
        warnings.append('%s is %s' % (name, numbers[name]))
        numbers[name] = None
    return dict(numbers, **{
        'accuracy': _ratio(right, total),
        'accuracy_interval_95': list(wilson_interval(right, total)),
        'examples': total,
        'global_step': int(evaluation['global_step']),
        'classes': figures,
        'confusion_matrix': confusion.tolist(),
        'warnings': warnings})


def write(report, path):
  """Writes the report as JSON; the file appears whole or not at all.

  Raises:
    UsageError: if it cannot be written.
  """
  with atomic_files.whole_gfile(path, '--report') as f:
    f.write(json.dumps(report, indent=2, allow_nan=False) + '\n')


def format_table(report):
  """The report as lines of text for a terminal."""
  def show(figure):
    return '-' if figure is None else '%.4f' % figure

  width = max(len(c['name']) for c in report['classes'])
  row = '%%-%ds %%9s %%9s %%9s %%9s' % max(width, len('class'))
  lines = [row % ('class', 'precision', 'recall', 'F1', 'examples')]
  lines += [row % ((c['name'],) + tuple(
      show(c[key]) for key in ('precision', 'recall', 'f1')) +
                   (c['examples'],)) for c in report['classes']]
  lines.append('accuracy %s, 95 %% interval %s to %s; loss %s; calibration '
               'error %s' % tuple(show(figure) for figure in [
                   report['accuracy']] + report['accuracy_interval_95'] + [
                       report['loss'], report['expected_calibration_error']]))
  lines += ['warning: ' + warning for warning in report['warnings']]
  return '\n'.join(lines)
