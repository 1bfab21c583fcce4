"""atomic_files: whole or not at all."""
import os

import pytest

import atomic_files


def write(path, text):
  with open(path, 'w') as f:
    f.write(text)


def read_folder(folder):
  """Dict of the folder's files to their text."""
  found = {}
  for name in os.listdir(str(folder)):
    with open(os.path.join(str(folder), name)) as f:
      found[name] = f.read()
  return found


def test_files_appear_together_at_the_end(tmp_path):
  paths = [str(tmp_path / name) for name in 'ab']
  with atomic_files.whole_files(paths) as temporaries:
    for temporary in temporaries:
      write(temporary, 'new')
    assert sorted(os.listdir(str(tmp_path))) == [
        '.a.unfinished', '.b.unfinished']
  assert read_folder(tmp_path) == {'a': 'new', 'b': 'new'}


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_what_was_there(tmp_path, error):
  write(str(tmp_path / 'a'), 'old')
  paths = [str(tmp_path / name) for name in 'ab']

  def fail():
    with atomic_files.whole_files(paths, [paths[0]]) as temporaries:
      write(temporaries[0], 'new')
      raise error

  with pytest.raises(error):
    fail()
  assert read_folder(tmp_path) == {'a': 'old'}


def test_superseded_files_go_before_the_new_ones_come(tmp_path, monkeypatch):
  write(str(tmp_path / 'a'), 'old')
  write(str(tmp_path / 'b'), 'old')
  seen = []
  replace = os.replace
  monkeypatch.setattr(os, 'replace', lambda *names: (
      seen.append(sorted(read_folder(tmp_path))), replace(*names)))
  with atomic_files.whole_files(
      [str(tmp_path / 'a')],
      [str(tmp_path / 'a'), str(tmp_path / 'b')]) as (temporary,):
    write(temporary, 'new')
  assert seen == [['.a.unfinished']]
  assert read_folder(tmp_path) == {'a': 'new'}


def test_a_name_without_folder_is_written_here(tmp_path, monkeypatch):
  monkeypatch.chdir(str(tmp_path))
  with atomic_files.whole_files(['a']) as (temporary,):
    write(temporary, 'new')
  assert read_folder(tmp_path) == {'a': 'new'}
