"""Trains and evaluates a ResNet on CIFAR-10 with an Estimator.

  python cifar10_main.py --data-dir DIR --job-dir DIR [--num-layers 44] ...

Reproduces arXiv 1512.03385, section 4.2, on one CPU or several GPUs: one tower
per device, variables shared, gradients averaged.
"""
import argparse
import contextlib
import functools
import sys

import atomic_files
import checks
import cifar10
import cifar10_model
import cifar10_utils
import cluster
import local_cluster
import model_fn
import training
import usage
from model_fn import _tower_fn  # noqa: F401 (a name of 2017)
from tf_compat import estimator, tf, use_graph_mode

# ---- input -------------------------------------------------------------------


def input_fn(data_dir, subset, num_shards, batch_size,
             use_distortion_for_training=True, seed=None, num_workers=1,
             worker_index=0, steps=1, devices=(), once=False, skip=0):
  """Reads a batch and splits it over the towers.

  Args:
    data_dir: str, folder of the TFRecord files.
    subset: 'train', 'validation' or 'eval'.
    num_shards: int, number of towers.
    batch_size: int, examples over all towers.
    use_distortion_for_training: bool.
    seed: int or None.
    num_workers: int, workers of the cluster, each reading its own share.
    worker_index: int in [0, num_workers).
    steps: int; more than 1 gives as many batches in a row, [steps, N, ...].
    devices: list of str, where each tower's pictures, uint8 until there,
      become floats; the CPU if it is empty.
    once: bool; read 'train' too in order, each example once, undistorted.
    skip: int, batches to drop at the start.

  Returns:
    Two lists of `num_shards` tensors: images float32 [N, 32, 32, 3] in
    [0, 255], labels int32 [N]. N is batch_size // num_shards in training.
  """
  with tf.device('/cpu:0'), tf.name_scope('input'):
    dataset = cifar10.Cifar10DataSet(
        data_dir, subset, subset == 'train' and use_distortion_for_training,
        seed, num_workers, worker_index, uint8=True, once=once)
    images, labels = training.split_batch(dataset, num_shards, batch_size,
                                          steps, skip)
    for i, image in enumerate(images):
      with tf.device(devices[i] if devices else '/cpu:0'):
        images[i] = tf.cast(image, tf.float32)
    return images, labels


# ---- model -------------------------------------------------------------------


def get_model_fn(num_gpus, variable_strategy, num_workers, virtual_devices=0):
  """The ResNet as an Estimator's model function: see model_fn.get_model_fn.

  Its `params` may have the flags of 2017 alone; the others have their defaults
  then, and CIFAR-10 its size.
  """
  build = model_fn.get_model_fn(num_gpus, variable_strategy, num_workers,
                                virtual_devices)

  def _model_fn(features, labels, mode, params, config=None):
    flags = build_parser().parse_args([])
    flags.num_examples = cifar10.SUBSETS['train']
    vars(flags).update(vars(params))
    flags.data_format = flags.data_format or (
        'channels_first' if num_gpus else 'channels_last')
    return build(features, labels, mode, flags, config)

  return _model_fn


# ---- main --------------------------------------------------------------------


def build_parser():
  """The flags: those of 2017, then those of today."""
  parser = usage.ArgumentParser(
      description=__doc__.splitlines()[0],
      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  training.add_flags(parser, required=False)  # see checks.require_folders
  add = parser.add_argument
  add('--num-layers', type=int, default=44,
      help='6n + 2; 9n + 2 with --block bottleneck_v2')
  add('--sync', action='store_true',
      help='synchronous updates over all workers of a cluster')
  add('--data-format', choices=['channels_first', 'channels_last'],
      help='layout inside the network (default: channels_first on GPU, '
      'channels_last on CPU)')
  add('--batch-norm-decay', type=float, default=0.997, help='in [0, 1)')
  add('--batch-norm-epsilon', type=float, default=1e-5, help='above 0')

  group = parser.add_argument_group('since 2017')
  training.add_new_flags(group, training.MODES + training.USING_MODES)
  training.add_guard_flags(group)
  add = group.add_argument
  add('--block', choices=sorted(cifar10_model.LAYERS_PER_UNIT), default='v1',
      help='residual unit')
  add('--precision', choices=['float32', 'bfloat16', 'float16'],
      default='float32',
      help='type of what passes between the layers; variables and batch norm '
      'statistics are float32 always')
  add('--visualize-activations', action='store_true',
      help='pictures of the intermediate outputs, one grid per layer')

  training.add_use_flags(parser.add_argument_group(
      'evaluate, predict and export'))

  add = parser.add_argument_group('cluster (see TF_CONFIG)').add_argument
  add('--num-workers', type=int,
      help='processes that train, the chief among them; TF_CONFIG says it, '
      'this checks it')
  add('--start-timeout-secs', type=int, default=0,
      help='end with status 1 if a peer is missing for so long at the start; '
      '0 waits for ever')
  add('--local-cluster', type=local_cluster.task_counts, default={},
      metavar='worker=W,ps=P[,evaluator=1]',
      help='start a chief and these on this machine, for trying it out')
  add('--max-restarts', type=int, default=3,
      help='of processes of --local-cluster that die')
  return parser


def main(job_dir=None, data_dir=None, num_gpus=None, variable_strategy='CPU',
         use_distortion_for_training=True, log_device_placement=False,
         num_intra_threads=0, **hparams):
  """Runs one mode; the arguments are the flags, those left out the defaults.

  Raises:
    UsageError: for input that a user can mend, before anything is written.
    SystemExit: with the status of a cluster or after a signal.
  """
  flags = build_parser().parse_args([])
  vars(flags).update(
      hparams, job_dir=job_dir, data_dir=data_dir, num_gpus=num_gpus,
      variable_strategy=variable_strategy,
      use_distortion_for_training=use_distortion_for_training,
      log_device_placement=log_device_placement,
      num_intra_threads=num_intra_threads)
  checks.require_folders(flags)
  if flags.local_cluster:
    num_workers = 1 + flags.local_cluster.get('worker', 0)
    cluster.check_num_workers(flags, num_workers, '--local-cluster')
    checks.resolve_flags(flags, num_workers)
    checks.count_checked_examples(flags)
    sys.exit(local_cluster.run(flags.local_cluster, flags.max_restarts))
  trains = flags.mode in ('train', 'train_and_evaluate')
  task = cluster.read_task(flags) if trains else None
  checks.resolve_flags(flags, task.num_workers if task else 1)
  if task and task.type == 'ps':
    cluster.serve_parameters(task, flags)
    return
  examples = checks.count_checked_examples(flags, task)
  flags.num_examples = examples.get('train')
  classify = functools.partial(_classify, flags)
  if flags.mode in ('predict', 'export'):
    training.use(classify, flags, checks.find_matching_checkpoint(flags))
    return
  checks.check_report(flags.report)
  # Twice, so that nothing is written for what is refused, and again when no
  # other process can write any more.
  warm_start = checks.find_resnet_warm_start(
      flags, checks.find_matching_checkpoint(flags))
  with contextlib.ExitStack() as stack:
    if not task or task.is_chief:
      checks.make_job_dir(flags.job_dir)
      if trains:
        stack.enter_context(atomic_files.locked(flags.job_dir, '--job-dir'))
    checkpoint = checks.find_matching_checkpoint(flags)
    cifar10_utils.log_configuration(
        flags, '%d layers, block %s' % (flags.num_layers, flags.block),
        examples, task)
    training.run(functools.partial(_classifier, flags, warm_start),
                 _inputs(flags, task), flags, checkpoint, task, classify)


def _classifier(flags, warm_start, task):
  """The Estimator of a task of a cluster, or of a process on its own."""
  config = training.session_config(flags, flags.virtual_devices)
  return estimator.Estimator(
      get_model_fn(flags.num_gpus, flags.variable_strategy,
                   task.num_workers if task else 1, flags.virtual_devices),
      config=training.run_config(flags, config, task), params=flags,
      warm_start_from=warm_start)


def _classify(flags, images):
  """Builds the network for inference.

  Args:
    flags: resolved flags.
    images: float32 [N, 32, 32, 3], preprocessed.

  Returns:
    Dict of classes, int64 [N], and probabilities, float32 [N, num_classes].
  """
  if flags.mode != 'predict':
    flags = argparse.Namespace(**dict(vars(flags), **checks.SERVING))
  build = get_model_fn(flags.num_gpus, flags.variable_strategy, 1,
                       flags.virtual_devices)
  return build([images], None, estimator.ModeKeys.PREDICT, flags).predictions


def _inputs(flags, task):
  """Dict of subset to input_fn without arguments, as the Estimator wants it."""
  shard = (task.num_workers, task.worker_index) if task else (1, 0)
  towers = flags.virtual_devices or flags.num_gpus
  devices = cifar10_utils.tower_devices(flags.num_gpus, flags.virtual_devices)

  def reader(subset, batch_size, *shard_and_steps, **kwargs):
    return functools.partial(
        input_fn, flags.data_dir, subset, towers, batch_size,
        flags.use_distortion_for_training, flags.seed, *shard_and_steps,
        devices=devices, **kwargs)

  if flags.mode == 'evaluate':
    return {flags.subset: reader(flags.subset, flags.eval_batch_size,
                                 once=True)}
  return {'train': reader('train', flags.train_batch_size, *shard,
                          flags.steps_per_call),
          'validation': reader('validation', flags.eval_batch_size),
          'eval': reader('eval', flags.eval_batch_size)}


if __name__ == '__main__':
  use_graph_mode()
  tf.logging.set_verbosity(tf.logging.INFO)
  usage.run(build_parser(), main)
