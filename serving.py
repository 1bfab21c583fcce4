"""A session's network -> a SavedModel, whole or not at all."""
import os

import atomic_files
from tf_compat import tf
from usage import UsageError


def check_folder(folder, flag):
  """Raises UsageError if there is something already."""
  if os.path.exists(folder):
    raise UsageError('%s %s is there already; name a new folder' %
                     (flag, folder))


def save(session, folder, flag, inputs, signatures):
  """Writes a SavedModel to a local folder.

  Args:
    flag: str, that named the folder.
    inputs: dict of name to tensor, of all signatures.
    signatures: dict of signature to dict of name to tensor, its outputs.

  Raises:
    UsageError: if it cannot be written.
  """
  check_folder(folder, flag)
  temporary = atomic_files.temporary_name(folder.rstrip('/'))
  try:
    atomic_files.remove(temporary)
    builder = tf.saved_model.Builder(temporary)
    builder.add_meta_graph_and_variables(
        session, [tf.saved_model.tag_constants.SERVING], {
            name: tf.saved_model.predict_signature_def(inputs, outputs)
            for name, outputs in signatures.items()})
    builder.save()
    os.replace(temporary, folder)
  except (OSError, tf.errors.OpError) as e:
    raise UsageError('%s %s cannot be written: %s' % (flag, folder, e))
  finally:
    atomic_files.remove(temporary)
