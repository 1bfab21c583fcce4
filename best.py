"""Evaluations while training -> the best checkpoint, and when to stop.

`JOB_DIR/best` holds the checkpoint with the highest accuracy on `validation`
and `best.json`, which outlives the process: the best of all runs counts.
"""
import json
import os

import atomic_files
import checkpoints
from tf_compat import estimator, tf


def read_state(job_dir):
  """Dict of accuracy, global_step, last_step, evaluations_since_best."""
  path = os.path.join(job_dir, 'best', 'best.json')
  try:
    with tf.gfile.GFile(path) as f:
      return dict(_NONE, **json.loads(f.read()))
  except (tf.errors.OpError, ValueError):  # there is none, or it is damaged
    return dict(_NONE)


_NONE = {'accuracy': -1, 'global_step': None, 'last_step': -1,
         'evaluations_since_best': 0}


def should_stop(flags):
  """True after --early-stop-evals evaluations without a better one."""
  return bool(flags.early_stop_evals and flags.early_stop_evals <= read_state(
      flags.job_dir)['evaluations_since_best'])


class BestExporter(estimator.Exporter):
  """Keeps the best checkpoint; the Estimator calls it after each evaluation.

  Unlike the Estimator's own, which keeps no checkpoint, it remembers the best
  in a file of its own and writes all three signatures.
  """

  def __init__(self, job_dir, write_model=None):
    """Args:
      job_dir: str.
      write_model: function (folder, checkpoint) that writes a SavedModel, or
        None.
    """
    self._job_dir = job_dir
    self._write_model = write_model
    self.evaluations_since_best = 0

  @property
  def name(self):
    return 'best'

  def export(self, estimator, export_path, checkpoint_path, eval_result,
             is_the_final_export):
    """Returns the path of the SavedModel, or None if none was written."""
    del estimator, is_the_final_export
    state = read_state(self._job_dir)
    step, accuracy = (int(eval_result['global_step']),
                      float(eval_result['accuracy']))
    if step == state['last_step']:
      return None
    state['last_step'] = step
    written = None
    if accuracy > state['accuracy']:
      checkpoints.copy(checkpoint_path, os.path.join(self._job_dir, 'best'))
      state.update(accuracy=accuracy, global_step=step,
                   evaluations_since_best=0)
      tf.logging.info('Best so far: accuracy %.4f at step %d', accuracy, step)
      if self._write_model:
        written = self._replace_model(export_path, str(step), checkpoint_path)
    else:
      state['evaluations_since_best'] += 1
    self.evaluations_since_best = state['evaluations_since_best']
    with atomic_files.whole_gfile(
        os.path.join(self._job_dir, 'best', 'best.json'), '--job-dir') as f:
      f.write(json.dumps(state) + '\n')
    return written

  def _replace_model(self, export_path, name, checkpoint):
    """Writes a SavedModel, named by its step; removes those before."""
    old = []
    if tf.gfile.IsDirectory(export_path):
      old = [n.rstrip('/') for n in tf.gfile.ListDirectory(export_path)]
    target = os.path.join(export_path, name)
    if name in old:
      tf.gfile.DeleteRecursively(target)
    self._write_model(target, checkpoint)
    for other in old:
      if other != name:
        tf.gfile.DeleteRecursively(os.path.join(export_path, other))
    return target


class EarlyStopHook(tf.train.SessionRunHook):
  """Ends training after some evaluations without a better one."""

  def __init__(self, exporter, early_stop_evals):
    self._exporter = exporter
    self._early_stop_evals = early_stop_evals

  def after_run(self, run_context, run_values):
    if self._exporter.evaluations_since_best >= self._early_stop_evals:
      tf.logging.info('No better accuracy in %d evaluations: stopping',
                      self._early_stop_evals)
      run_context.request_stop()
