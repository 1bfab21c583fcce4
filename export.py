"""A checkpoint -> a SavedModel that classifies pictures without this project.

Three signatures on one set of weights, all with the outputs `classes`, int64
[N], and `probabilities`, float32 [N, num_classes]:

  serving_default  image_bytes: string [N], PNG or JPEG of any size
  images           images: float32 [N, 32, 32, 3] in [0, 255]
  examples         examples: string [N], serialized tf.train.Example

The names of the classes are the lines of `assets/classes.txt`.
"""
import contextlib
import os

import atomic_files
import pictures
from cifar10 import DEPTH, HEIGHT, WIDTH
from tf_compat import tf
from usage import UsageError


def restore(session, checkpoint):
  """Restores the variables of the default graph.

  Raises:
    UsageError: if the checkpoint lacks one, or cannot be read.
  """
  try:
    tf.train.Saver(tf.global_variables()).restore(session, checkpoint)
  except (tf.errors.OpError, ValueError) as e:
    raise UsageError('checkpoint %s cannot be restored: %s' %
                     (checkpoint, str(e).splitlines()[0]))


def signature(name, tensor, outputs):
  """SignatureDef of one input and the outputs."""
  return tf.saved_model.predict_signature_def({name: tensor}, outputs)


def build_signatures(classify, dataset):
  """Builds the network once per kind of input, on shared variables.

  Args:
    classify: function from float32 [N, 32, 32, 3], preprocessed, to a dict of
      output tensors.
    dataset: Cifar10DataSet; its parser and preprocess are the model's too.

  Returns:
    Dict of signature name to SignatureDef.
  """
  with tf.name_scope('serving'):
    contents = tf.placeholder(tf.string, [None], 'image_bytes')
    images = tf.placeholder(tf.float32, [None, HEIGHT, WIDTH, DEPTH], 'images')
    examples = tf.placeholder(tf.string, [None], 'examples')
    inputs = [
        ('serving_default', 'image_bytes', contents,
         dataset.preprocess(pictures.decode_pictures(contents))),
        ('images', 'images', images, dataset.preprocess(images)),
        ('examples', 'examples', examples, dataset.parser(examples)[0])]
  signatures = {}
  for key, name, tensor, preprocessed in inputs:
    with tf.variable_scope(tf.get_variable_scope(), reuse=tf.AUTO_REUSE):
      signatures[key] = signature(name, tensor, classify(preprocessed))
  return signatures


def write(export_dir, build, checkpoint, class_names):
  """Writes the SavedModel of a checkpoint, whole or not at all.

  Args:
    export_dir: str, a folder that is not there yet, or is empty.
    build: function without arguments that builds an inference graph and returns
      a dict of signature name to SignatureDef.
    checkpoint: str, prefix of the one whose weights it gets.
    class_names: list of str, written to the asset `classes.txt`.

  Raises:
    UsageError: if the folder is in use or cannot be written.
  """
  with new_folder(export_dir) as folder, tf.Graph().as_default(), \
      tf.Session() as session:
    signatures = build()
    restore(session, checkpoint)
    save(session, folder, signatures, class_names)


@contextlib.contextmanager
def new_folder(path, flag='--export-dir'):
  """Yields a folder to write to, which takes its name when it is complete.

  Args:
    path: str, a folder that is not there yet, or is empty.
    flag: str, the flag to name in an error.

  Raises:
    UsageError: if the folder is in use or cannot be written.
  """
  path = path.rstrip('/')
  temporary = atomic_files.temporary_name(path)
  try:
    check_is_free(path, flag)
    if tf.gfile.Exists(temporary):
      tf.gfile.DeleteRecursively(temporary)
    tf.gfile.MakeDirs(os.path.dirname(path) or '.')
    try:
      yield temporary
      if tf.gfile.Exists(path):
        tf.gfile.DeleteRecursively(path)  # it is empty
      tf.gfile.Rename(temporary, path)
    finally:
      if tf.gfile.Exists(temporary):
        tf.gfile.DeleteRecursively(temporary)
  except tf.errors.OpError as e:
    raise UsageError('%s %s cannot be written: %s' % (flag, path, e.message))


def check_is_free(path, flag='--export-dir'):
  """Raises UsageError unless the folder is missing or empty."""
  if not tf.gfile.Exists(path):
    return
  if not tf.gfile.IsDirectory(path) or tf.gfile.ListDirectory(path):
    raise UsageError('%s %s: expected a new or empty folder' % (flag, path))


def save(session, folder, signatures, class_names=()):
  """Writes a session's graph and variables to a new folder as a SavedModel."""
  builder = tf.saved_model.Builder(folder)
  names = os.path.join(folder, 'classes.txt')
  if class_names:
    with tf.gfile.GFile(names, 'w') as f:
      f.write(''.join(name + '\n' for name in class_names))
    tf.add_to_collection(tf.GraphKeys.ASSET_FILEPATHS,
                         tf.constant(names, name='class_names'))
  builder.add_meta_graph_and_variables(
      session, [tf.saved_model.SERVING], signatures,
      tf.get_collection(tf.GraphKeys.ASSET_FILEPATHS), clear_devices=True)
  builder.save()
  if class_names:
    tf.gfile.Remove(names)  # it was copied to assets/
