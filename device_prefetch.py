"""The next batch waits in the memory of its GPU while a step runs.

A staging area on each GPU holds one batch. A session call takes that out and
puts the next in, so that reading, copying and the cast to float run beside the
step, not before it. Tested on virtual CPU devices; on a GPU not measured.
"""
from tf_compat import tf

PUTS, CLEARS = 'device_prefetch/puts', 'device_prefetch/clears'


def is_wanted(device):
  """Whether pictures are copied to get there."""
  return device.startswith('/gpu')


def staging(input_fn, devices):
  """An input_fn whose batches, one per device, come by way of staging areas.

  Args:
    input_fn: callable to lists of features and labels, as `input_fn` in
      cifar10_main.py.
    devices: list of str, one for each element of the lists.
  """
  def staged_input_fn():
    features, labels = input_fn()
    if not is_wanted(devices[0]):
      return features, labels
    batches = [_stage(batch, device, 'tower_%d' % i) for i, (batch, device)
               in enumerate(zip(zip(features, labels), devices))]
    return tuple(map(list, zip(*batches)))
  return staged_input_fn


def _stage(tensors, device, name):
  """Puts tensors in; returns what the call before put in."""
  area = {'dtypes': [t.dtype for t in tensors], 'shared_name': name}
  with tf.device(device), tf.name_scope('staging'):
    tf.add_to_collection(PUTS, tf.raw_ops.Stage(values=tensors,
                                                shared_name=name))
    tf.add_to_collection(CLEARS, tf.raw_ops.StageClear(**area))
    staged = tf.raw_ops.Unstage(**area)
  for new, old in zip(staged, tensors):
    new.set_shape(old.shape)
  return staged


class StagingHook(tf.train.SessionRunHook):
  """Puts the first batch in, then one with each session call."""

  def begin(self):
    self._puts = tf.get_collection(PUTS)
    self._clears = tf.get_collection(CLEARS)

  def after_create_session(self, session, coord):
    # A session that replaces a lost one may find what that had put in.
    session.run(self._clears)
    session.run(self._puts)

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(self._puts)
