"""tf_compat: one API from 1.15 to 2.21, clear errors outside."""
import logging
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import tf_compat
from tf_compat import estimator, tf


@pytest.mark.parametrize('version', ['1.15.5', '2.15.1', '2.21.0', '2.18.0rc1'])
def test_supported_versions_are_accepted(version):
  major, minor = version.split('.')[:2]
  assert tf_compat.check_version(version) == (int(major), int(minor))


@pytest.mark.parametrize('version', ['1.14.0', '2.0.0', '2.14.1', '2.22.0',
                                     '3.0.0'])
def test_other_versions_are_refused_with_the_range(version):
  with pytest.raises(ImportError, match=r'%s is installed.*1\.15, or 2\.15 to '
                     r'2\.21' % version):
    tf_compat.check_version(version)


def test_estimator_is_the_real_one():
  assert estimator.Estimator.__module__.startswith('tensorflow_estimator')
  assert issubclass(estimator.BestExporter, estimator.Exporter)
  assert estimator.ModeKeys.TRAIN == 'train'


@pytest.mark.skipif(tf_compat._VERSION < (2, 16),
                    reason='up to 2.15 TensorFlow brings its own Estimator')
def test_a_missing_estimator_is_named():
  code = ('import importlib.util as u; find = u.find_spec\n'
          'u.find_spec = lambda name, *rest: ('
          '    None if name == "tensorflow_estimator" else find(name, *rest))\n'
          'import tf_compat')
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT,
                        stderr=subprocess.PIPE, universal_newlines=True)
  assert done.returncode == 1
  assert 'pip install tensorflow-estimator==2.15.0' in done.stderr


@pytest.mark.parametrize('given, expected', [(None, '1'), ('0', '0')])
def test_onednn_is_on_unless_the_user_says_otherwise(given, expected):
  env = {k: v for k, v in os.environ.items() if k != 'TF_ENABLE_ONEDNN_OPTS'}
  if given is not None:
    env['TF_ENABLE_ONEDNN_OPTS'] = given
  code = 'import os, tf_compat; print(os.environ["TF_ENABLE_ONEDNN_OPTS"])'
  printed = subprocess.check_output([sys.executable, '-c', code], cwd=ROOT,
                                    env=env, stderr=subprocess.DEVNULL)
  assert printed.decode().strip() == expected


@pytest.mark.parametrize('message, shown', [
    ('From x.py: Estimator.__init__ is deprecated. Use tf.keras instead.',
     False),
    ('Loss is not falling', True)])
def test_only_the_keras_notices_are_silenced(message, shown):
  record = logging.LogRecord('tensorflow', logging.WARNING, '', 0, message, (),
                             None)
  assert tf_compat._is_not_estimator_notice(record) is shown


def test_graph_mode_has_resource_variables():
  assert not tf.executing_eagerly()
  assert tf.get_variable('v', []).op.type == 'VarHandleOp'
