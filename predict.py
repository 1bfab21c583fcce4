"""Pictures or TFRecords -> class, name and probabilities, one line each.

Lines are in the order of the inputs: CSV, or one JSON object per line where the
file's name ends in .jsonl.
"""
import contextlib
import csv
import json
import os
import re
import sys

import numpy as np

import atomic_files
import cifar10
import export
import pictures
from tf_compat import tf
from usage import UsageError

PICTURES = ('.png', '.jpg', '.jpeg')
RECORDS = ('.tfrecords', '.tfrecord')


def list_files(inputs):
  """Paths of the files; a folder stands for what is directly in it, by name.

  Raises:
    UsageError: for what is missing, or a folder without pictures and records.
  """
  paths = []
  for path in inputs:
    try:
      if not tf.gfile.Exists(path):
        raise UsageError('--input %s is not there' % path)
      paths += _list_folder(path) if tf.gfile.IsDirectory(path) else [path]
    except UnicodeError as e:
      raise UsageError('--input %a: expected names in UTF-8: %s' % (path, e))
  return paths


def _list_folder(folder):
  names = [n for n in tf.gfile.ListDirectory(folder) if n[0] != '.']
  files = files_among(folder, names, PICTURES + RECORDS)
  if not files:
    raise UsageError('--input %s has no %s' %
                     (folder, ', '.join(PICTURES + RECORDS)))
  return files


def files_among(folder, names, endings):
  """Paths of what is a file and ends so among the names in a folder, sorted."""
  paths = [os.path.join(folder, name) for name in sorted(names)
           if name.lower().endswith(endings)]
  return [path for path in paths if not tf.gfile.IsDirectory(path)]


def _is_picture(path):
  """By its first bytes, whatever its name says; a TFRecord by its name."""
  if path.lower().endswith(RECORDS):
    return False
  with tf.gfile.GFile(path, 'rb') as f:
    start = f.read(len(pictures.PNG_SIGNATURE))
  return (path.lower().endswith(PICTURES) or
          start.startswith((pictures.PNG_SIGNATURE, pictures.JPEG_SIGNATURE)))


def check_files(paths):
  """Reads all records once; returns whether any of them has a label.

  Raises:
    UsageError: naming file and record.
  """
  has_labels = False
  for path in paths:
    if _is_picture(path):
      continue
    if not cifar10.count_records(path):
      raise UsageError('--input %s is empty' % path)
    for _, label in cifar10.read_examples(
        path, cifar10.picture_label):
      has_labels |= label is not None
  return has_labels


class _Decoder(object):
  """Decodes inputs one by one into what the network takes."""

  def __init__(self, dataset):
    """Builds the graph; `dataset` preprocesses as in evaluation."""
    self._bytes = tf.placeholder(tf.string, [])
    self._picture = dataset.preprocess(pictures.decode_picture(self._bytes))
    self._record = dataset.parser(self._bytes)[0]

  def read(self, session, paths):
    """Yields (name, label or None, image float32 [32, 32, 3])."""
    for path in paths:
      if not _is_picture(path):
        for i, (record, label) in enumerate(
            cifar10.read_examples(path, cifar10.picture_label)):
          yield '%s:%d' % (path, i), label, session.run(
              self._record, {self._bytes: record})
        continue
      try:
        with tf.gfile.GFile(path, 'rb') as f:
          contents = f.read()
        yield path, None, session.run(self._picture, {self._bytes: contents})
      except tf.errors.OpError as e:
        raise UsageError('--input %s is no picture that can be read: %s' %
                         (path, reason(e)))


def reason(error):
  """The part of an OpError that says what is wrong with the data."""
  # TensorFlow puts lines about the graph before and after it.
  lines = re.split(r'\s*\[\[(?:\{\{)?node', error.message)[0].splitlines()
  return lines[-1].rsplit('assertion failed: ', 1)[-1][:200] if lines else ''


def batches(items, size):
  """Yields lists of up to `size` items."""
  batch = []
  for item in items:
    batch.append(item)
    if len(batch) == size:
      yield batch
      batch = []
  if batch:
    yield batch


def run(classify, dataset, checkpoint, class_names, inputs, output, batch_size):
  """Writes one line per input.

  Args:
    classify: function from float32 [N, 32, 32, 3], preprocessed, to a dict of
      `classes` [N] and `probabilities` [N, num_classes].
    dataset: Cifar10DataSet; its parser and preprocess prepare the inputs.
    checkpoint: str, prefix.
    class_names: list of str, one per class.
    inputs: list of str, files and folders.
    output: str, a .csv or .jsonl file, which appears whole or not at all; '-'
      is standard output, as CSV.
    batch_size: int.

  Raises:
    UsageError: naming the input that cannot be read, or the output.
  """
  check_output(output)
  paths = list_files(inputs)
  has_labels = check_files(paths)
  with tf.Graph().as_default(), tf.Session() as session, \
      _opened(output) as file:
    decoder = _Decoder(dataset)
    images = tf.placeholder(
        tf.float32, [None, cifar10.HEIGHT, cifar10.WIDTH, cifar10.DEPTH])
    outputs = classify(images)
    export.restore(session, checkpoint)
    write = (_json_writer if output.endswith('.jsonl') else _csv_writer)(
        file, class_names, has_labels)
    for batch in batches(decoder.read(session, paths), batch_size):
      names, labels, pictures = zip(*batch)
      results = session.run(outputs, {images: np.stack(pictures)})
      if not np.isfinite(results['probabilities']).all():
        raise UsageError('checkpoint %s gives probabilities that are not '
                         'finite; take an earlier one' % checkpoint)
      for row in zip(names, labels, results['classes'],
                     results['probabilities']):
        write(*row)


def check_output(output):
  """Raises UsageError unless the format is known."""
  if output != '-' and not output.endswith(('.csv', '.jsonl')):
    raise UsageError('--output %s: expected a name that ends in .csv or '
                     '.jsonl, or -' % output)


@contextlib.contextmanager
def _opened(output):
  if output != '-':
    with atomic_files.whole_gfile(output, '--output') as file:
      yield file
    return
  try:
    yield sys.stdout
    sys.stdout.flush()
  except OSError as e:
    # What is left in the buffer must not fail once more at the exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(e, BrokenPipeError):  # as of `| head`: nobody reads on
      raise UsageError('--output - cannot be written: %s' % e)


def _csv_writer(file, class_names, has_labels):
  """Writes the header; returns a function that writes a row."""
  writer = csv.writer(file, lineterminator='\n')
  writer.writerow(['input'] + ['label'] * has_labels + ['class', 'name'] +
                  ['probability_' + name for name in class_names])

  def write(name, label, predicted, probabilities):
    labels = ['' if label is None else label] * has_labels
    writer.writerow([name] + labels + [predicted, class_names[predicted]] +
                    ['%.9g' % p for p in probabilities])
  return write


def _json_writer(file, class_names, has_labels):
  """Returns a function that writes an object per line."""
  del has_labels  # each line has its own keys

  def write(name, label, predicted, probabilities):
    row = {'input': name, 'class': int(predicted),
           'name': class_names[predicted],
           'probabilities': [float('%.9g' % p) for p in probabilities]}
    if label is not None:
      row['label'] = label
    file.write(json.dumps(row) + '\n')
  return write
