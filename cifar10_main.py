"""Trains and evaluates a ResNet on CIFAR-10 with an Estimator.

  python cifar10_main.py --data-dir DIR --job-dir DIR [--num-layers 44] ...

Reproduces arXiv 1512.03385, section 4.2, on one CPU or several GPUs: one tower
per device, variables shared, gradients averaged.
"""
import argparse
import functools

import checks
import cifar10
import cifar10_model
import cifar10_utils
import summaries
import usage
from model_fn import _tower_fn, get_model_fn  # noqa: F401 (2017 names)
from tf_compat import estimator, tf, use_graph_mode

MODES = ('train_and_evaluate', 'train', 'evaluate')


# ---- input -------------------------------------------------------------------


def input_fn(data_dir, subset, num_shards, batch_size,
             use_distortion_for_training=True, seed=None):
  """Reads a batch and splits it over the towers.

  Args:
    data_dir: str, folder of the TFRecord files.
    subset: 'train', 'validation' or 'eval'.
    num_shards: int, number of towers.
    batch_size: int, examples over all towers.
    use_distortion_for_training: bool.
    seed: int or None.

  Returns:
    Two lists of `num_shards` tensors: images float32 [N, 32, 32, 3] in
    [0, 255], labels int32 [N]. N is batch_size // num_shards in training.
  """
  with tf.device('/cpu:0'), tf.name_scope('input'):
    dataset = cifar10.Cifar10DataSet(
        data_dir, subset, subset == 'train' and use_distortion_for_training,
        seed)
    if subset != 'train' and num_shards > 1:
      batch_size = cifar10_utils.batch_size_without_empty_towers(
          batch_size, dataset.count_examples(), num_shards)
    images, labels = dataset.make_batch(batch_size)
    if num_shards <= 1:
      return [images], [labels]
    sizes = num_shards
    if subset != 'train':  # the last batch may not divide
      sizes = (tf.size(labels) + tf.range(num_shards)) // num_shards
    return (tf.split(images, sizes, num=num_shards),
            tf.split(labels, sizes, num=num_shards))


# ---- main --------------------------------------------------------------------


def build_parser():
  """The flags: those of 2017, then those of today."""
  parser = usage.ArgumentParser(
      description=__doc__.splitlines()[0],
      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  add = parser.add_argument
  add('--data-dir', required=True,
      help='folder of the TFRecord files that generate_cifar10_tfrecords.py '
      'writes')
  add('--job-dir', required=True,
      help='folder of checkpoints and TensorBoard events')
  add('--variable-strategy', choices=['CPU', 'GPU'], default='CPU',
      help='where variables live and are updated')
  add('--num-gpus', type=int,
      help='towers, one per GPU; 0 is one on the CPU (default: 1 where a GPU '
      'is visible, else 0)')
  add('--num-layers', type=int, default=44,
      help='6n + 2; 9n + 2 with --block bottleneck_v2')
  add('--train-steps', type=int, default=80000,
      help='global step at which training ends')
  add('--train-batch-size', type=int, default=128,
      help='examples per step, over all towers')
  add('--eval-batch-size', type=int, default=100,
      help='examples per evaluation step, over all towers')
  add('--momentum', type=float, default=0.9, help='in [0, 1)')
  add('--weight-decay', type=float, default=2e-4,
      help='factor of the L2 loss of every trainable variable')
  add('--learning-rate', type=float,
      help='rate before the first boundary (default: 0.1; 0.05 for the '
      'pre-activation blocks, which diverge at 0.1)')
  add('--use-distortion-for-training', type=usage.boolean, default=True,
      nargs='?', const=True, metavar='True|False',
      help='crop and mirror training pictures at random')
  add('--sync', action='store_true',
      help='synchronous updates over all workers of a cluster')
  add('--num-intra-threads', type=int, default=0,
      help='threads inside an op; 0 is one per core')
  add('--num-inter-threads', type=int, default=0,
      help='ops run at once; 0 is one per core')
  add('--data-format', choices=['channels_first', 'channels_last'],
      help='layout inside the network (default: channels_first on GPU, '
      'channels_last on CPU)')
  add('--log-device-placement', action='store_true',
      help='log the device of every op')
  add('--batch-norm-decay', type=float, default=0.997, help='in [0, 1)')
  add('--batch-norm-epsilon', type=float, default=1e-5, help='above 0')

  add = parser.add_argument_group('since 2017').add_argument
  add('--mode', choices=MODES, default=MODES[0],
      help='train_and_evaluate: on validation while it trains, on eval at the '
      'end')
  add('--block', choices=sorted(cifar10_model.LAYERS_PER_UNIT), default='v1',
      help='residual unit')
  add('--num-classes', type=int, default=10 + 1,
      help='logits; labels must be below')
  add('--virtual-devices', type=int, default=0, metavar='N',
      help='N towers on virtual CPU devices, to try several without GPUs')
  add('--seed', type=int,
      help='of every random choice; with it CPU runs repeat')
  add('--eval-every-secs', type=int, default=600,
      help='seconds between evaluations, at least; each needs a new checkpoint')
  add('--save-checkpoints-steps', type=int,
      help='steps between checkpoints (default: one every 600 s)')
  add('--keep-checkpoint-max', type=int, default=5,
      help='checkpoints kept; 0 keeps all')
  add('--summaries', choices=['none', 'scalars', 'full'], default='scalars',
      help='for TensorBoard: scalars, and pictures at each evaluation; full '
      'adds histograms, dead ReLUs and kernels')
  add('--summary-steps', type=int, default=100,
      help='steps between summaries')
  add('--visualize-activations', action='store_true',
      help='pictures of the intermediate outputs, one grid per layer')
  add('--profile-steps', type=usage.step_range, metavar='A:B',
      help='trace the steps from A to before B to timeline-STEP.json')
  add('--lr-boundaries-epochs', type=usage.comma_separated(float),
      default=[82, 123, 300], metavar='E,E,...',
      help='epochs at which the learning rate changes')
  add('--lr-factors', type=usage.comma_separated(float),
      default=[1, 0.1, 0.01, 0.002], metavar='F,F,...',
      help='of --learning-rate, before and after each boundary')
  return parser


def main(job_dir, data_dir, num_gpus=None, variable_strategy='CPU',
         use_distortion_for_training=True, log_device_placement=False,
         num_intra_threads=0, **hparams):
  """Runs one mode; the arguments are the flags, those left out the defaults.

  Raises:
    UsageError: for input that a user can mend, before anything is written.
  """
  flags = build_parser().parse_args(
      ['--job-dir', job_dir, '--data-dir', data_dir])
  vars(flags).update(
      hparams, num_gpus=num_gpus, variable_strategy=variable_strategy,
      use_distortion_for_training=use_distortion_for_training,
      log_device_placement=log_device_placement,
      num_intra_threads=num_intra_threads)
  checks.resolve_flags(flags)
  examples = checks.count_checked_examples(flags)
  flags.num_examples = examples.get('train')
  checkpoint = checks.find_matching_checkpoint(flags)
  checks.make_job_dir(flags.job_dir)
  cifar10_utils.log_configuration(flags, examples)

  classifier = estimator.Estimator(
      get_model_fn(flags.num_gpus, flags.variable_strategy, 1,
                   flags.virtual_devices),
      config=_run_config(flags), params=flags)
  step = cifar10_utils.checkpoint_step(checkpoint) if checkpoint else 0
  if flags.mode != 'evaluate':
    if step >= flags.train_steps:
      tf.logging.info('Nothing left to train: %s is at step %d, --train-steps '
                      'is %d', checkpoint, step, flags.train_steps)
    else:
      if checkpoint:  # the Estimator resumes from the one on record
        tf.train.update_checkpoint_state(flags.job_dir, checkpoint)
      if flags.summaries != 'none':
        summaries.write_flags(flags.job_dir, vars(flags), step)
      _train(classifier, flags)
  if flags.mode != 'train':
    _evaluate(classifier, flags)


def _run_config(flags):
  """RunConfig and session configuration for the flags."""
  session_config = tf.ConfigProto(
      allow_soft_placement=True,
      log_device_placement=flags.log_device_placement,
      intra_op_parallelism_threads=flags.num_intra_threads,
      inter_op_parallelism_threads=flags.num_inter_threads,
      gpu_options=tf.GPUOptions(force_gpu_compatible=True))
  if flags.virtual_devices:
    session_config.device_count['CPU'] = flags.virtual_devices
  saving = ({'save_checkpoints_steps': flags.save_checkpoints_steps}
            if flags.save_checkpoints_steps else {})
  return cifar10_utils.RunConfig(
      model_dir=flags.job_dir, tf_random_seed=flags.seed,
      session_config=session_config,
      save_summary_steps=(
          0 if flags.summaries == 'none' else flags.summary_steps),
      keep_checkpoint_max=flags.keep_checkpoint_max, **saving)


def _evaluation_hooks(classifier, flags, name=None):
  """Pictures beside the other events of the evaluation `name`."""
  if flags.summaries == 'none':
    return []
  return [summaries.EvaluationPicturesHook(
      classifier.eval_dir(name),
      cifar10.class_names(flags.data_dir, flags.num_classes))]


def _input_fn(flags, subset, batch_size):
  """input_fn without arguments, as the Estimator wants it."""
  return functools.partial(
      input_fn, flags.data_dir, subset,
      flags.virtual_devices or flags.num_gpus, batch_size,
      flags.use_distortion_for_training, flags.seed)


def _train(classifier, flags):
  """Trains up to --train-steps, evaluating on validation if asked to."""
  train = _input_fn(flags, 'train', flags.train_batch_size)
  if flags.mode == 'train':
    classifier.train(train, max_steps=flags.train_steps)
    return
  estimator.train_and_evaluate(
      classifier,
      estimator.TrainSpec(train, max_steps=flags.train_steps),
      # Differs from 2017: validation pictures here, the test set once at the
      # end, because a test set that is looked at all along tests nothing.
      estimator.EvalSpec(
          _input_fn(flags, 'validation', flags.eval_batch_size), steps=None,
          hooks=_evaluation_hooks(classifier, flags),
          start_delay_secs=0, throttle_secs=flags.eval_every_secs))


def _evaluate(classifier, flags):
  """Evaluates the latest checkpoint on the test set; prints one line."""
  results = classifier.evaluate(
      _input_fn(flags, 'eval', flags.eval_batch_size), name='test',
      hooks=_evaluation_hooks(classifier, flags, 'test'),
      checkpoint_path=cifar10_utils.latest_checkpoint(flags.job_dir))
  print('eval: accuracy=%.4f loss=%.4f global_step=%d examples=%d' %
        (results['accuracy'], results['loss'], results['global_step'],
         results['examples']))


if __name__ == '__main__':
  use_graph_mode()
  tf.logging.set_verbosity(tf.logging.INFO)
  usage.run(build_parser(), main)
