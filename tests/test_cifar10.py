"""cifar10: records to batches."""
import collections
import os

import numpy as np
import pytest
from conftest import serialize, write_records

import cifar10
import machine
from cifar10 import Cifar10DataSet
from tf_compat import tf
from usage import UsageError


def planes(*values):
  """uint8 [3, 32, 32], each plane constant."""
  return np.stack([np.full((32, 32), v, np.uint8) for v in values])


@pytest.fixture
def data_dir(tmp_path):
  """20 training, 7 validation and 11 eval pictures; label i % 10, red i."""
  for subset, count in (('train', 20), ('validation', 7), ('eval', 11)):
    write_records(tmp_path / (subset + '.tfrecords'),
                  [serialize(planes(i, 0, 0), i % 10) for i in range(count)])
  return str(tmp_path)


def batches(dataset, batch_size, count=None):
  """List of (image, label) arrays; all of them unless `count` is given."""
  with tf.Graph().as_default(), tf.Session() as session:
    next_batch = dataset.make_batch(batch_size)
    found = []
    try:
      while count is None or len(found) < count:
        found.append(session.run(next_batch))
    except tf.errors.OutOfRangeError:
      pass
    return found


def numbers(found):
  """The red value of the first pixel of each picture, which numbers it."""
  return [int(i) for image, _ in found for i in image[:, 16, 16, 0]]


def test_label_and_channel_order_survive_the_parser():
  record = serialize(planes(0, 1, 2), 7)
  dataset = Cifar10DataSet('', 'eval')
  one = dataset.parser(tf.constant(record))
  batch = dataset.parser(tf.constant([record] * 3))
  assert one[0].shape.as_list() == [32, 32, 3]
  assert batch[0].shape.as_list() == [3, 32, 32, 3]
  assert (one[0].dtype, one[1].dtype) == (tf.float32, tf.int32)
  with tf.Session() as session:
    image, label = session.run(one)
    images, labels = session.run(batch)
  np.testing.assert_array_equal(image, np.tile([0, 1, 2], (32, 32, 1)))
  np.testing.assert_array_equal(images, [image] * 3)
  assert label == 7
  assert labels.tolist() == [7, 7, 7]


def test_parser_keeps_rows_and_columns():
  image = np.arange(3072).reshape(3, 32, 32).astype(np.uint8)
  parsed, _ = Cifar10DataSet('', 'eval').parser(
      tf.constant(serialize(image, 0)))
  with tf.Session() as session:
    np.testing.assert_array_equal(session.run(parsed),
                                  image.transpose(1, 2, 0))


@pytest.mark.parametrize('batch_size', [1, 2, 4, 7, 11, 100])
def test_evaluation_reads_each_example_once_in_order(data_dir, batch_size):
  found = batches(Cifar10DataSet(data_dir, 'eval'), batch_size)
  assert numbers(found) == list(range(11))
  assert [int(n) for _, label in found for n in label] == [
      i % 10 for i in range(11)]


def test_an_epoch_has_each_example_once_and_epochs_differ(data_dir):
  dataset = Cifar10DataSet(data_dir, 'train', use_distortion=False)
  found = numbers(batches(dataset, 4, 15))
  epochs = [found[i:i + 20] for i in (0, 20, 40)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(20))
    assert epoch != list(range(20))  # 1 in 20! by chance
  assert epochs[0] != epochs[1] != epochs[2]


def test_the_same_seed_repeats_and_another_does_not(data_dir):
  first, again, other = [
      batches(Cifar10DataSet(data_dir, 'train', seed=seed), 8, 10)
      for seed in (3, 3, 4)]
  for a, b in zip(first, again):
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])
  assert any((a[0] != b[0]).any() for a, b in zip(first, other))


def test_workers_share_the_records(data_dir):
  shares = [set(numbers(batches(
      Cifar10DataSet(data_dir, 'train', False, num_workers=3, worker_index=i),
      4, 10))) for i in range(3)]
  assert set.union(*shares) == set(range(20))
  assert sum(map(len, shares)) == 20


def test_without_distortion_pictures_are_as_stored(data_dir):
  for image, _ in batches(Cifar10DataSet(data_dir, 'train', False), 20, 1):
    assert all((i[..., 0] == i[0, 0, 0]).all() for i in image)


def distort(count, image, seed=None):
  """Distorts `count` copies of a float32 [32, 32, 3] picture."""
  dataset = Cifar10DataSet('', 'train', seed=seed)
  copies = dataset.preprocess(tf.tile(tf.constant(image)[tf.newaxis],
                                      [count, 1, 1, 1]))
  with tf.Session() as session:
    return session.run(copies)


def test_distortion_makes_every_crop_and_flips_half():
  # Each pixel holds its own row and column, so a crop tells where it was made.
  image = np.zeros((32, 32, 3), np.float32)
  image[..., 0] = np.arange(1, 33)[:, np.newaxis]
  image[..., 1] = np.arange(1, 33)
  padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), 'constant')
  found = collections.Counter()
  for crop in distort(4000, image):
    flip = crop[16, 8, 1] > crop[16, 23, 1]
    straight = crop[:, ::-1] if flip else crop
    y = int(straight[16, 16, 0]) + 3 - 16
    x = int(straight[16, 16, 1]) + 3 - 16
    # The whole crop is from the padded picture, nothing from outside it.
    np.testing.assert_array_equal(straight, padded[y:y + 32, x:x + 32])
    found[y, x, flip] += 1
  offsets = {(y, x) for y, x, _ in found}
  assert offsets == {(y, x) for y in range(9) for x in range(9)}
  flipped = sum(n for (_, _, flip), n in found.items() if flip)
  assert abs(flipped - 2000) < 5 * 32  # 5 standard deviations


def test_preprocess_takes_one_picture():
  image = np.ones((32, 32, 3), np.float32)
  one = Cifar10DataSet('', 'train').preprocess(tf.constant(image))
  assert one.shape.as_list() == [32, 32, 3]
  for subset, distortion in (('train', False), ('eval', True)):
    same = Cifar10DataSet('', subset, distortion).preprocess(image)
    np.testing.assert_array_equal(same, image)


def test_examples_are_counted_on_disk(data_dir):
  counted = [Cifar10DataSet(data_dir, s).count_examples()
             for s in cifar10.SUBSETS]
  assert counted == [20, 7, 11]
  assert [Cifar10DataSet.num_examples_per_epoch(s)
          for s in ('train', 'validation', 'eval')] == [45000, 5000, 10000]
  with pytest.raises(ValueError, match='Invalid data subset "test"'):
    Cifar10DataSet.num_examples_per_epoch('test')


def test_shards_are_read_in_order(tmp_path):
  for shard in range(3):
    write_records(tmp_path / ('eval-%05d-of-00003.tfrecords' % shard),
                  [serialize(planes(10 * shard + i, 0, 0), 0)
                   for i in range(2)])
  dataset = Cifar10DataSet(str(tmp_path), 'eval')
  assert numbers(batches(dataset, 4)) == [0, 1, 10, 11, 20, 21]
  assert dataset.count_examples() == 6
  os.remove(str(tmp_path / 'eval-00001-of-00003.tfrecords'))
  with pytest.raises(UsageError, match='expected eval-00001-of-00003'):
    dataset.get_filenames()


def test_the_folder_may_be_named_like_a_pattern(tmp_path):
  folder = tmp_path / 'data[1] *'
  folder.mkdir()
  write_records(folder / 'eval-00000-of-00001.tfrecords',
                [serialize(planes(0, 1, 2), 7)])
  assert Cifar10DataSet(str(folder), 'eval').count_examples() == 1


def test_two_layouts_at_once_are_refused(data_dir):
  write_records(os.path.join(data_dir, 'eval-00000-of-00001.tfrecords'), [])
  with pytest.raises(UsageError, match='both eval.tfrecords and eval-00000'):
    Cifar10DataSet(data_dir, 'eval').get_filenames()


def test_a_missing_subset_says_how_to_make_it(tmp_path):
  with pytest.raises(UsageError, match='no train.tfrecords; make it with'):
    Cifar10DataSet(str(tmp_path)).get_filenames()


GOOD = serialize(planes(0, 0, 0), 1)


def damaged(position, value):
  """Two records of 3,126 bytes, one byte of the file changed."""
  def damage(data):
    data[position] = value
    return data
  return damage


@pytest.mark.parametrize('damage, message', [
    (lambda data: data[:-1], 'record 1 .* is truncated'),
    (lambda data: data[:3126 + 5], 'record 1 .* is truncated'),
    (lambda data: b'not a record file, but long enough', 'record 0 .* not a '
     'TFRecord'),
    (damaged(3126 + 100, 77), 'record 1 .* is corrupt'),
    (damaged(3126 + 9, 77), 'record 1 .* is corrupt'),
    (damaged(3126 + 7, 128), 'record 1 .* is truncated'),  # length over 2^63
    (lambda data: b'', 'has no records in eval; make it with'),
])
def test_damaged_files_are_named_with_the_record(tmp_path, damage, message):
  path = tmp_path / 'eval.tfrecords'
  write_records(path, [GOOD, GOOD])
  path.write_bytes(bytes(damage(bytearray(path.read_bytes()))))
  with pytest.raises(UsageError, match=message) as error:
    Cifar10DataSet(str(tmp_path), 'eval').check_records(11)
  assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize('record, message', [
    (serialize(planes(0, 0), 1), 'record 1 .* image of 2048 bytes; expected '
     '3072'),
    (serialize(planes(0, 0, 0), 11), r'record 1 .* label 11; expected one in '
     r'\[0, 11\)'),
    (serialize(planes(0, 0, 0), -1), 'record 1 .* label -1'),
    (tf.train.Example().SerializeToString(), 'record 1 .* image of 0 bytes'),
    (b'\xff\xff', 'record 1 .* is not a tf.train.Example'),
])
def test_unfit_records_are_named(tmp_path, record, message):
  write_records(tmp_path / 'eval.tfrecords', [GOOD, record, GOOD])
  with pytest.raises(UsageError, match=message):
    Cifar10DataSet(str(tmp_path), 'eval').check_records(11)


def test_good_records_are_counted(data_dir):
  assert Cifar10DataSet(data_dir, 'train').check_records(10) == 20


def test_data_that_does_not_fit_in_memory_is_streamed(
    data_dir, monkeypatch, caplog):
  # A third of this holds five of the 20 records and what is kept beside each.
  size = os.path.getsize(os.path.join(data_dir, 'train.tfrecords')) // 20 + 100
  monkeypatch.setattr(machine, 'usable_memory', lambda: 3 * 5 * size + 3)
  dataset = Cifar10DataSet(data_dir, 'train', use_distortion=False, seed=1)
  with caplog.at_level('WARNING', logger='tensorflow'):
    found = batches(dataset, 4, 5)
  assert sorted(numbers(found)) == list(range(20))
  assert numbers(found) != list(range(20))
  assert 'would not fit into a third of the memory' in caplog.text
  assert 'shuffled 5 at a time' in caplog.text


def test_data_that_fits_is_read_from_disk_once(data_dir):
  with tf.Graph().as_default(), tf.Session() as session:
    image, _ = Cifar10DataSet(data_dir, 'train', seed=1).make_batch(20)
    session.run(image)
    os.remove(os.path.join(data_dir, 'train.tfrecords'))
    for _ in range(5):
      session.run(image)


def test_pictures_can_stay_uint8_with_the_same_contents(data_dir):
  pictures = [batches(Cifar10DataSet(data_dir, 'train', seed=1, uint8=uint8),
                      4, 3) for uint8 in (True, False)]
  for (small, _), (large, _) in zip(*pictures):
    assert (small.dtype, large.dtype) == (np.uint8, np.float32)
    np.testing.assert_array_equal(small, large)


def test_an_overridden_preprocess_gets_floats_as_in_2017(data_dir):
  class Shifted(Cifar10DataSet):
    def preprocess(self, image):
      assert image.dtype == tf.float32
      return image - 0.5

  (image, _), = batches(Shifted(data_dir, 'eval', uint8=True), 11)
  np.testing.assert_array_equal(image[:, 0, 0, 0], np.arange(11) - 0.5)


def test_several_batches_in_a_row_are_those_of_one_by_one(data_dir):
  single = batches(Cifar10DataSet(data_dir, 'train', seed=1), 4, 6)
  with tf.Graph().as_default(), tf.Session() as session:
    several = session.run(
        Cifar10DataSet(data_dir, 'train', seed=1).make_batch(4, steps=6))
  for index in (0, 1):
    np.testing.assert_array_equal(several[index],
                                  [batch[index] for batch in single])
