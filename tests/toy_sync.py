"""A task of a synchronous cluster that counts its gradients.

  TF_CONFIG=... python toy_sync.py JOB_DIR STEPS

The loss is 3 * `constant` + (global step) * `steps`: the one gradient is always
3; the other is the global step that it was computed at, and tells its age. The
rate is 0.5. Worker 1 is slow. The chief prints the result as JSON.
"""
import argparse
import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cluster  # noqa: E402
import stop_signals  # noqa: E402
import tf_config  # noqa: E402
from tf_compat import estimator, tf, use_graph_mode  # noqa: E402


class Slow(tf.train.SessionRunHook):

  def before_run(self, run_context):
    time.sleep(0.05)


def model_fn(features, labels, mode, params, config):
  step = tf.train.get_global_step()
  constant = tf.get_variable('constant', [], initializer=tf.zeros_initializer())
  steps = tf.get_variable('steps', [], initializer=tf.zeros_initializer())
  loss = 3 * constant + tf.stop_gradient(tf.cast(step, tf.float32)) * steps
  optimizer = tf.train.SyncReplicasOptimizer(
      tf.train.GradientDescentOptimizer(0.5), params['replicas'])
  train_op = optimizer.minimize(loss, global_step=step)
  hooks = [cluster.SyncHook(optimizer, config.is_chief, is_new=True)]
  if config.task_type == 'worker' and config.task_id == 1:
    hooks.append(Slow())
  return estimator.EstimatorSpec(mode, loss=loss, train_op=train_op,
                                 training_hooks=hooks)


def main(job_dir, steps):
  use_graph_mode()
  tf.logging.set_verbosity(tf.logging.INFO)
  flags = argparse.Namespace(job_dir=job_dir, train_steps=int(steps), sync=True,
                             start_timeout_secs=120)
  task = tf_config.parse_tf_config(os.environ['TF_CONFIG'])
  if task.type == 'ps':
    cluster.serve_parameters(task, flags)
  config = tf.ConfigProto()
  arguments = cluster.run_config_arguments(task, config)
  classifier = estimator.Estimator(
      model_fn, params={'replicas': task.num_workers},
      config=estimator.RunConfig(model_dir=job_dir, session_config=config,
                                 **arguments))
  with stop_signals.noted():
    cluster.train(classifier, lambda: tf.data.Dataset.from_tensors(0).repeat(),
                  task, flags)
  if task.is_chief:
    print(json.dumps({name: float(classifier.get_variable_value(name))
                      for name in ('constant', 'steps', 'global_step')}))
  cluster.leave(0)


if __name__ == '__main__':
  main(*sys.argv[1:])
