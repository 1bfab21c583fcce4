"""TensorFlow 1.15 to 2.21 behind two names: `tf` and `estimator`.

  from tf_compat import tf, estimator

`tf` is TensorFlow's 1.x API (`tensorflow.compat.v1`), `estimator` the real
Estimator: TensorFlow's own up to 2.15; from 2.16, which removed it, the last
released `tensorflow-estimator` with what it misses put back. This is the only
file that asks which TensorFlow is installed.
"""
import functools
import importlib
import importlib.util
import logging
import os
import re
import sys
import types

# oneDNN's convolutions double the training speed on a CPU, and 2.x leaves them
# off on processors without AVX-512; the second hides C++ start-up notices.
# TensorFlow reads both while it loads.
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import tensorflow  # noqa: E402  (after the environment it reads)

SUPPORTED = '1.15, or 2.15 to 2.21'


def check_version(version):
  """Returns (major, minor) of a supported TensorFlow `version` string.

  Raises:
    ImportError: if the version is outside the supported range.
  """
  major_minor = tuple(int(n) for n in re.findall(r'\d+', version)[:2])
  if major_minor != (1, 15) and not (2, 15) <= major_minor <= (2, 21):
    raise ImportError('TensorFlow %s is installed; this project runs on '
                      'TensorFlow %s' % (version, SUPPORTED))
  return major_minor


def _refuse_strategy(*args, **kwargs):
  raise NotImplementedError(
      'tf.distribute strategies are not supported by this Estimator')


def _restore_what_estimator_imports():
  """Puts back two things tensorflow-estimator 2.15 imports and 2.16 removed."""
  from tensorflow.python import distribute
  from tensorflow.python.util import tf_export

  tf_export.ESTIMATOR_API_NAME = 'estimator'
  for attrs, suffix in ((tf_export.API_ATTRS, ''),
                        (tf_export.API_ATTRS_V1, '_v1')):
    attrs['estimator'] = tf_export._Attributes(
        '_estimator_api_names' + suffix, '_estimator_api_constants' + suffix)

  # Reached only when a tf.distribute strategy is passed.
  training = types.ModuleType('tensorflow.python.distribute.estimator_training')
  training.should_run_distribute_coordinator = lambda config: False
  for name in ('init_run_config', 'train_and_evaluate', 'estimator_train',
               'estimator_evaluate'):
    setattr(training, name, _refuse_strategy)
  sys.modules[training.__name__] = training
  distribute.estimator_training = training


def _load_released_estimator():
  """Returns the `estimator` namespace of the tensorflow-estimator package."""
  spec = importlib.util.find_spec('tensorflow_estimator')
  if spec is None:
    raise ImportError('TensorFlow %s has no Estimator of its own: run '
                      '"pip install tensorflow-estimator==2.15.0"' %
                      tensorflow.__version__)
  _restore_what_estimator_imports()
  # The package's own __init__ imports TPU code that no longer exists.
  package = types.ModuleType('tensorflow_estimator')
  package.__path__ = list(spec.submodule_search_locations)
  sys.modules['tensorflow_estimator'] = package

  namespace = types.SimpleNamespace(export=types.SimpleNamespace())
  for module, names in (
      ('estimator', ('Estimator', 'WarmStartSettings')),
      ('run_config', ('RunConfig', 'TaskType')),
      ('model_fn', ('EstimatorSpec',)),
      ('mode_keys', ('ModeKeys',)),
      ('training', ('TrainSpec', 'EvalSpec', 'train_and_evaluate')),
      ('exporter', ('Exporter', 'BestExporter', 'FinalExporter',
                    'LatestExporter'))):
    module = importlib.import_module(
        'tensorflow_estimator.python.estimator.' + module)
    for name in names:
      setattr(namespace, name, getattr(module, name))
  export = importlib.import_module(
      'tensorflow_estimator.python.estimator.export.export')
  outputs = importlib.import_module(
      'tensorflow.python.saved_model.model_utils.export_output')
  namespace.export.ServingInputReceiver = export.ServingInputReceiver
  namespace.export.PredictOutput = outputs.PredictOutput
  namespace.export.ClassificationOutput = outputs.ClassificationOutput
  return namespace


def _is_not_estimator_notice(record):
  """Logging filter: drops the Estimator's advice to move to Keras."""
  message = str(record.msg) + str(record.args)
  return 'Use tf.keras instead' not in message


def use_graph_mode():
  """Switches the process to graphs and resource variables, as in 2017.

  Called where a program starts, never on import. Resource variables make runs
  repeatable on 1.15, whose default reference variables do not.
  """
  tf.disable_eager_execution()
  tf.enable_resource_variables()


def set_recovery_wait_secs(secs):
  """Sets how often a worker looks whether the chief has initialised or
  restored the variables: every 30 s in TensorFlow, which has no setting."""
  manager = tf.train.SessionManager
  manager.__init__ = functools.partialmethod(manager.__init__,
                                             recovery_wait_secs=secs)


_VERSION = check_version(tensorflow.__version__)
tf = tensorflow.compat.v1
logging.getLogger('tensorflow').addFilter(_is_not_estimator_notice)
estimator = tf.estimator if _VERSION < (2, 16) else _load_released_estimator()


def chrome_trace(run_metadata):
  """JSON for chrome://tracing of a step that ran with FULL_TRACE."""
  from tensorflow.python.client import timeline
  return timeline.Timeline(
      run_metadata.step_stats).generate_chrome_trace_format()


# Iterates over the records (bytes) of a TFRecord file. Deprecated in favour of
# eager execution, which this project does not use: called without its notice.
read_records = tf.io.tf_record_iterator.__wrapped__
