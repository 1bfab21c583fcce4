"""An Estimator's model function and its inputs -> a trained job directory.

What `cifar10_main.py` does with any network: the flags of a training, the
configuration of the Estimator, training that evaluates on `validation`, one
evaluation on `eval` at the end; and the modes that use what was trained.
"""
import contextlib
import errno
import functools
import os
import sys
import time

import best
import checkpoints
import cifar10
import cifar10_utils
import cluster
import device_prefetch
import export
import machine
import nan_guard
import predict
import report
import stop_signals
import summaries
import usage
from tf_compat import estimator, tf
from usage import UsageError

MODES = ('train_and_evaluate', 'train', 'evaluate')
# Of the flags that only cifar10_main.py has.
GUARD_DEFAULTS = {'export_best': False, 'early_stop_evals': None,
                  'on_nan': 'stop', 'max_restores': 0, 'resume_exact': False,
                  'subset': 'eval', 'report': None}
USING_MODES = ('predict', 'export')  # of cifar10_main.py


def add_flags(parser, required=True):
  """Adds the flags of 2017 that do not depend on the network."""
  add = parser.add_argument
  add('--data-dir', required=required,
      help='folder of the TFRecord files that generate_cifar10_tfrecords.py '
      'writes; predict and export only look for its classes.txt')
  add('--job-dir', required=required,
      help='folder of checkpoints and TensorBoard events')
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
  add('--variable-strategy', choices=['CPU', 'GPU'], default='CPU',
      help='where variables live and are updated')
  add('--num-gpus', type=int,
      help='towers, one per GPU; 0 is one on the CPU (default: 1 where a GPU '
      'is visible, else 0)')
  add('--use-distortion-for-training', type=usage.boolean, default=True,
      nargs='?', const=True, metavar='True|False',
      help='crop and mirror training pictures at random')
  add('--num-intra-threads', type=int, default=0,
      help='threads inside an op; 0 is one per core this process may use')
  add('--num-inter-threads', type=int, default=0,
      help='ops run at once; 0 is one per core this process may use')
  add('--log-device-placement', action='store_true',
      help='log the device of every op, and a table of variables per device')


def add_new_flags(parser, modes=MODES):
  """Adds the flags since 2017 that do not depend on the network."""
  add = parser.add_argument
  add('--mode', choices=modes, default=modes[0],
      help='train_and_evaluate: on validation while it trains, on eval at the '
      'end')
  add('--virtual-devices', type=int, default=0, metavar='N',
      help='N towers on virtual CPU devices, to try several without GPUs')
  add('--num-classes', type=int, default=10 + 1,
      help='logits; labels must be below')
  add('--warm-start-from', metavar='CKPT',
      help='checkpoint or job directory whose values training starts from, '
      'where the job directory has none yet')
  add('--warm-start-exclude', type=usage.comma_separated(str), default=[],
      metavar='SCOPE,...',
      help='variables below these scopes start at random')
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
      help='steps between summaries, and between lines about the speed')
  add('--profile-steps', type=usage.step_range, metavar='A:B',
      help='trace the steps from A to before B to timeline-STEP.json')
  add('--steps-per-call', type=int, default=1, metavar='K',
      help='training steps in one session call; hooks look between calls')
  add('--xla', action='store_true',
      help='compile the towers with XLA; on a CPU oneDNN is faster')
  add('--lr-boundaries-epochs', type=usage.comma_separated(float),
      default=[82, 123, 300], metavar='E,E,...',
      help='epochs at which the learning rate changes')
  add('--lr-factors', type=usage.comma_separated(float),
      default=[1, 0.1, 0.01, 0.002], metavar='F,F,...',
      help='of --learning-rate, before and after each boundary')


def add_guard_flags(parser):
  """Adds the flags of the best model, NaN and exact resuming."""
  add = parser.add_argument
  add('--export-best', action='store_true',
      help='keep the checkpoint with the highest accuracy on validation in '
      'JOB_DIR/best, and its SavedModel in JOB_DIR/export/best')
  add('--early-stop-evals', type=int, metavar='N',
      help='stop after N evaluations without a better accuracy; keeps the best '
      'checkpoint in JOB_DIR/best')
  add('--on-nan', choices=['stop', 'restore'], default='stop',
      help='when the loss is not finite: stop with status 3, or go back to the '
      'last checkpoint with half the rate')
  add('--max-restores', type=int, default=3, help='of --on-nan restore')
  add('--resume-exact', action='store_true',
      help='with --seed: a resumed run reads the data from where it stopped')


def add_use_flags(parser):
  """Adds the flags of evaluate, predict and export."""
  add = parser.add_argument
  add('--checkpoint', metavar='DIR|PREFIX',
      help='to use (default: the newest of --job-dir)')
  add('--subset', choices=list(cifar10.SUBSETS), default='eval',
      help='to evaluate on')
  add('--report', metavar='JSON',
      help='where evaluate writes its figures per class, confusion matrix and '
      'calibration error')
  add('--input', nargs='+', metavar='FILE|DIR',
      help='what to predict: PNG, JPEG, TFRecords, folders of them')
  add('--output', default='-', metavar='CSV|JSONL',
      help='where predictions go, by its ending; - is standard output, as CSV')
  add('--export-dir', metavar='DIR',
      help='new folder for the SavedModel')


def split_batch(dataset, num_shards, batch_size, steps=1, skip=0):
  """Reads a batch and splits it over the towers.

  Args:
    dataset: Cifar10DataSet, or another with its methods.
    num_shards: int, number of towers.
    batch_size: int, examples over all towers.
    steps: int; more than 1 gives as many batches in a row, [steps, N, ...].
    skip: int, batches to drop at the start.

  Returns:
    Two lists of `num_shards` tensors, features and labels.
  """
  training = dataset.training
  if not training and num_shards > 1:
    batch_size = cifar10_utils.batch_size_without_empty_towers(
        batch_size, dataset.count_examples(), num_shards)
  features, labels = dataset.make_batch(batch_size, steps, skip)
  if num_shards <= 1:
    return [features], [labels]
  sizes = num_shards
  if not training:  # the last batch may not divide
    sizes = (tf.size(labels) + tf.range(num_shards)) // num_shards
  axis = 1 if steps > 1 else 0
  return (tf.split(features, sizes, axis, num_shards),
          tf.split(labels, sizes, axis, num_shards))


def session_config(flags, virtual_devices=0):
  """tf.ConfigProto for the flags."""
  cores = machine.usable_cores()
  config = tf.ConfigProto(
      allow_soft_placement=True,
      log_device_placement=flags.log_device_placement,
      intra_op_parallelism_threads=flags.num_intra_threads or cores,
      inter_op_parallelism_threads=flags.num_inter_threads or cores,
      gpu_options=tf.GPUOptions(force_gpu_compatible=True))
  if virtual_devices:
    config.device_count['CPU'] = virtual_devices
  return config


def run_config(flags, config, task=None):
  """RunConfig for the flags.

  Args:
    flags: resolved flags.
    config: tf.ConfigProto of the sessions; completed for a cluster.
    task: Task of this process in a cluster, or None.
  """
  saving = ({'save_checkpoints_steps': flags.save_checkpoints_steps}
            if flags.save_checkpoints_steps else {})
  saving.update(cluster.run_config_arguments(task, config))
  return cifar10_utils.RunConfig(
      model_dir=flags.job_dir, tf_random_seed=flags.seed,
      session_config=config,
      save_summary_steps=(
          0 if flags.summaries == 'none' else flags.summary_steps),
      log_step_count_steps=flags.summary_steps,
      keep_checkpoint_max=flags.keep_checkpoint_max, **saving)


def run(make_classifier, inputs, flags, checkpoint, task=None, classify=None):
  """Does what --mode asks for.

  Args:
    make_classifier: callable from a Task or None to an Estimator.
    inputs: dict of 'train', 'validation' and 'eval' to input functions.
    flags: resolved flags.
    checkpoint: str or None, prefix of the newest one in the job directory.
    task: Task of this process in a cluster, or None.
    classify: function that builds the network for --export-best, see `use`.

  Raises:
    SystemExit: status 0 or 130 if a signal ended training, a checkpoint having
      been saved; 3 if the loss was not finite; 1 if the disk is full.
  """
  for name, default in GUARD_DEFAULTS.items():
    vars(flags).setdefault(name, default)
  if task and task.type == 'evaluator':
    _evaluate_all_along(make_classifier(task), inputs, flags, classify, task,
                        checkpoint)
    return
  if flags.mode == 'evaluate':
    _evaluate(make_classifier(None), inputs, flags, checkpoint)
    return
  with stop_signals.noted():
    step = cifar10_utils.checkpoint_step(checkpoint) if checkpoint else 0
    if step >= flags.train_steps:
      tf.logging.info('Nothing left to train: %s is at step %d, --train-steps '
                      'is %d', checkpoint, step, flags.train_steps)
    elif not task and best.should_stop(flags):
      tf.logging.info('Nothing left to train: --early-stop-evals %d has been '
                      'reached', flags.early_stop_evals)
    else:
      _train(make_classifier, inputs, flags, checkpoint, classify, task)
      checkpoint = cifar10_utils.latest_checkpoint(flags.job_dir)
    if flags.mode != 'train' and (not task or task.is_chief):
      _evaluate(make_classifier(None), inputs, flags, checkpoint,
                [stop_signals.EndEvaluationHook()])
  if task:
    cluster.leave(0)


def _train(make_classifier, inputs, flags, checkpoint, classify, task):
  """Trains up to --train-steps, in several goes where --on-nan restores."""
  is_chief = not task or task.is_chief
  if is_chief:
    checkpoints.remove_unfinished(flags.job_dir)
  if flags.summaries != 'none' and is_chief:
    summaries.write_flags(flags.job_dir, vars(flags), checkpoint)
  restores = 0
  with _full_disk_explained(flags.job_dir):
    while True:
      if checkpoint and is_chief:  # the Estimator resumes from that on record
        checkpoints.make_latest(flags.job_dir, checkpoint)
      classifier = make_classifier(task)
      guard = None if task else nan_guard.NanGuard(flags.steps_per_call,
                                                   flags.train_steps)
      try:
        _train_once(classifier, inputs, flags, checkpoint, classify, task,
                    guard)
        break
      except tf.train.NanLossDuringTrainingError:
        checkpoint = _report_nan(classifier, flags, guard)
      if flags.on_nan == 'stop' or restores >= flags.max_restores:
        sys.exit(nan_guard.EXIT_STATUS)
      restores += 1
      flags.learning_rate /= 2
      tf.logging.warning('Restore %d of %d: from %s at --learning-rate %g',
                         restores, flags.max_restores, checkpoint,
                         flags.learning_rate)
  if stop_signals.received():
    (cluster.leave if task else sys.exit)(stop_signals.exit_status())


def _train_once(classifier, inputs, flags, checkpoint, classify, task, guard):
  """Trains from a checkpoint, or from none, until the end or a NaN."""
  devices = cifar10_utils.tower_devices(flags.num_gpus, flags.virtual_devices)
  if task:
    cluster.train(classifier, device_prefetch.staging(inputs['train'], devices),
                  task, flags)
    return
  step = cifar10_utils.checkpoint_step(checkpoint) if checkpoint else 0
  if step and not flags.resume_exact:
    tf.logging.info('The order of the data does not continue from step %d but '
                    'starts anew; with --seed, --resume-exact continues it',
                    step)
  train_input = inputs['train']
  if flags.resume_exact:
    train_input = functools.partial(train_input, skip=step)
  train_input = device_prefetch.staging(train_input, devices)
  hooks = [guard]
  if flags.steps_per_call == 1:  # else what saves looks a call ahead
    train_input = nan_guard.holding(train_input)
    hooks.append(_saver_hook(classifier.config))
  if flags.mode == 'train':
    classifier.train(train_input, hooks=hooks, max_steps=flags.train_steps)
  else:
    _train_and_evaluate(classifier, dict(inputs, train=train_input), flags,
                        classify, hooks=hooks)


def _saver_hook(config):
  """Saves as the Estimator would, except what is not finite."""
  return tf.train.CheckpointSaverHook(
      config.model_dir, save_secs=config.save_checkpoints_secs,
      save_steps=config.save_checkpoints_steps,
      listeners=[nan_guard.FiniteCheckpoints()])


def _report_nan(classifier, flags, guard):
  """Explains a loss that was not finite; returns the last good checkpoint."""
  checkpoint = checkpoints.newest_readable(flags.job_dir, finite=True)
  tensor = None
  to_explain = guard and guard.step_to_explain()
  if to_explain:
    step, held = to_explain
    tensor = nan_guard.first_not_finite(classifier.model_fn, classifier.config,
                                        held, checkpoint)
    if tensor:
      tensor['step'] = step
  nan_guard.write_report(
      nan_guard.make_report(guard, tensor, flags, checkpoint), flags.job_dir)
  return checkpoint


@contextlib.contextmanager
def _full_disk_explained(job_dir):
  """Turns the error of a full disk into a line and status 1."""
  try:
    yield
  except (tf.errors.OpError, OSError, UsageError) as e:
    reason = str(e)
    if not any(os.strerror(number) in reason for number in (
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
      raise
    checkpoints.remove_unfinished(job_dir)
    tf.logging.error(
        '--job-dir %s: the disk is full. The last checkpoint is %s; free some '
        'space and start again with the same command', job_dir,
        checkpoints.newest_readable(job_dir))
    sys.exit(1)


def _train_and_evaluate(classifier, inputs, flags, classify, task=None,
                        hooks=()):
  """Trains and evaluates in turns; an evaluator does the latter only."""
  hooks = list(hooks)
  exporters = []
  if flags.export_best or flags.early_stop_evals:
    exporters = [_best_exporter(classify, flags)]
  if flags.early_stop_evals:
    hooks.append(best.EarlyStopHook(exporters[0], flags.early_stop_evals))
  estimator.train_and_evaluate(
      classifier,
      estimator.TrainSpec(inputs['train'], max_steps=flags.train_steps,
                          hooks=hooks),
      # Differs from 2017: validation pictures here, the test set once at the
      # end, because a test set that is looked at all along tests nothing.
      estimator.EvalSpec(
          inputs['validation'], steps=None, exporters=exporters,
          hooks=_evaluation_hooks(classifier, flags) + [
              stop_signals.EndEvaluationHook()],
          start_delay_secs=0,
          # An evaluator has nothing else to do: it takes every checkpoint.
          throttle_secs=1 if task else flags.eval_every_secs))


def _best_exporter(classify, flags):
  """Keeps the best checkpoint, and exports it where asked to."""
  write_model = functools.partial(_export, classify, flags)
  return best.BestExporter(flags.job_dir,
                           write_model if flags.export_best else None)


def _evaluate_all_along(classifier, inputs, flags, classify, task, checkpoint):
  """The evaluator of a cluster: evaluates each checkpoint it finds."""
  stop_signals.exit_on_sigterm()
  if not checkpoint and 'ps' in task.jobs:  # a chief alone opens no port
    cluster.wait_for_peers(task, flags)
  while True:
    try:
      _train_and_evaluate(classifier, inputs, flags, classify, task)
      return
    except (tf.errors.NotFoundError, ValueError) as e:
      if 'model.ckpt' not in str(e):
        raise
      tf.logging.info('A checkpoint was removed while it was being read, '
                      'because newer ones have come: %s', e)
      time.sleep(1)


def _evaluation_hooks(classifier, flags, name=None):
  """Pictures beside the other events of the evaluation `name`."""
  if flags.summaries == 'none':
    return []
  return [summaries.EvaluationPicturesHook(
      classifier.eval_dir(name),
      cifar10.class_names(flags.data_dir, flags.num_classes))]


def _evaluate(classifier, inputs, flags, checkpoint, hooks=()):
  """Evaluates a checkpoint; prints one line, and a table where asked to."""
  name = 'test' if flags.subset == 'eval' else flags.subset
  names = cifar10.class_names(flags.data_dir, flags.num_classes)
  hook = report.ReportHook(names, cifar10.count_named_classes(flags.data_dir))
  results = classifier.evaluate(
      inputs[flags.subset], name=name, checkpoint_path=checkpoint,
      hooks=_evaluation_hooks(classifier, flags, name) + [hook, *hooks])
  print('eval: accuracy=%.4f loss=%.4f global_step=%d examples=%d' %
        (results['accuracy'], results['loss'], results['global_step'],
         results['examples']))
  if flags.mode == 'evaluate':
    figures = hook.result(results)
    figures.update(checkpoint=checkpoint, subset=flags.subset)
    print(report.format_table(figures), file=sys.stderr)
    if flags.report:
      report.write(figures, flags.report)


def use(classify, flags, checkpoint):
  """Predicts or exports, as --mode says.

  Args:
    classify: function from float32 [N, 32, 32, 3], preprocessed, to a dict of
      `classes` [N] and `probabilities` [N, num_classes].
    flags: resolved flags.
    checkpoint: str, prefix of the one to use.
  """
  if flags.mode == 'export':
    _export(classify, flags, flags.export_dir, checkpoint)
    print('exported %s to %s' % (checkpoint, flags.export_dir))
    return
  predict.run(classify, cifar10.Cifar10DataSet(flags.data_dir, 'eval'),
              checkpoint, cifar10.class_names(flags.data_dir,
                                              flags.num_classes),
              flags.input, flags.output, flags.eval_batch_size)


def _export(classify, flags, export_dir, checkpoint):
  export.write(
      export_dir, functools.partial(
          export.build_signatures, classify,
          cifar10.Cifar10DataSet(flags.data_dir, 'eval')),
      checkpoint, cifar10.class_names(flags.data_dir, flags.num_classes))
