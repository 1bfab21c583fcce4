"""--mode evaluate --report: figures that can be checked by hand."""
import json

import numpy as np
import pytest
from conftest import GOLDEN, refused_main, run_main, write_golden_records

import report


def test_wilson_interval_by_hand():
  # (0.8 + 1.92 / 10 -+ 1.96 sqrt(0.16 / 10 + 3.84 / 400)) / 1.384
  low, high = report.wilson_interval(8, 10)
  assert low == pytest.approx(0.4902, abs=1e-4)
  assert high == pytest.approx(0.9433, abs=1e-4)
  assert report.wilson_interval(10, 10)[0] == pytest.approx(0.7225, abs=1e-4)
  assert 1 - 1e-9 < report.wilson_interval(10, 10)[1] <= 1
  assert 0 <= report.wilson_interval(0, 10)[0] < 1e-9
  assert report.wilson_interval(0, 0) == (None, None)


def test_calibration_error_by_hand():
  # Two bins: 0.9 and 0.9 sure, one right: |0.5 - 0.9|; 0.3 sure, right: 0.7.
  error = report.calibration_error(np.array([.9, .9, .3]),
                                   np.array([True, False, True]))
  assert error == pytest.approx((2 * .4 + .7) / 3)
  assert report.calibration_error(np.array([1., 1.]),
                                  np.array([True, True])) == 0


def test_class_figures_by_hand_and_zero_by_zero_is_none():
  figures, warnings = report.class_figures(
      np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]]), ['a', 'b', 'c'])
  assert figures[0] == {'class': 0, 'name': 'a', 'examples': 4, 'predicted': 5,
                        'precision': 3 / 5, 'recall': 3 / 4, 'f1': 6 / 9}
  assert figures[2]['precision'] is figures[2]['recall'] is None
  assert figures[2]['f1'] is None
  assert len(warnings) == 2
  assert 'class 2 (c) has no examples' in warnings[0]


@pytest.mark.parametrize('subset, checkpoint', [
    ('eval', GOLDEN), ('validation', GOLDEN + '/model.ckpt-0'),
    ('train', GOLDEN + '/model.ckpt-0.index')])
def test_the_report_is_json_with_all_figures(capfd, golden, tmp_path, subset,
                                             checkpoint):
  write_golden_records(tmp_path / (subset + '.tfrecords'), golden)
  run_main('--mode', 'evaluate', '--data-dir', tmp_path, '--job-dir',
           tmp_path / 'job', '--checkpoint', checkpoint, '--subset', subset,
           '--report', tmp_path / 'report.json', '--eval-batch-size', 3,
           '--summaries', 'none')
  found = json.loads((tmp_path / 'report.json').read_text())
  labels = golden['labels']
  classes = golden['eval_logits'].argmax(1)
  assert found['accuracy'] == (classes == labels).mean()
  assert found['examples'] == 8
  confusion = np.zeros([11, 11], int)  # the spare logit was predicted
  np.add.at(confusion, (labels, classes), 1)
  assert found['confusion_matrix'] == confusion.tolist()
  assert found['accuracy_interval_95'] == list(
      report.wilson_interval((classes == labels).sum(), 8))
  assert 0 <= found['expected_calibration_error'] <= 1
  assert (found['subset'], found['global_step']) == (subset, 0)
  missing = set(range(11)) - set(labels)
  assert all(found['classes'][i]['recall'] is None for i in missing)
  assert sum('has no examples' in w for w in found['warnings']) == len(missing)
  out, err = capfd.readouterr()
  assert out.startswith('eval: accuracy=')
  assert out.count('\n') == 1
  assert 'precision    recall        F1' in err
  assert 'airplane' in err


def test_bad_arguments_are_refused(capsys, golden, tmp_path):
  write_golden_records(tmp_path / 'eval.tfrecords', golden)
  common = ['--mode', 'evaluate', '--data-dir', tmp_path, '--job-dir',
            tmp_path / 'job']
  for args, message in [
      (['--checkpoint', tmp_path], 'expected a job directory with a'),
      (['--checkpoint', 'missing-1'], '--checkpoint missing-1: expected'),
      (['--checkpoint', GOLDEN, '--subset', 'test'], "invalid choice: 'test'"),
      (['--checkpoint', GOLDEN, '--report', tmp_path], 'is a folder'),
      (['--checkpoint', GOLDEN, '--report', tmp_path / 'no' / 'r.json'],
       'r.json cannot be written'),
      (['--checkpoint', GOLDEN, '--input', 'x'], '--mode predict'),
      ([], 'has no checkpoint; train first')]:
    assert message in refused_main(capsys, *(common + args))
  assert not (tmp_path / 'job').exists()
