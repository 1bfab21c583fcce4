"""What the README and setup.py promise is what is there."""
import glob
import os
import re

from conftest import ROOT

import cifar10_main


def read(name):
  with open(os.path.join(ROOT, name)) as f:
    return f.read()


def test_every_flag_is_in_the_readme_and_the_other_way_round():
  table = read('README.md').split('## Flags of `cifar10_main.py`')[1].split(
      '\n## ')[0]
  documented = set()
  for row in re.findall(r'^\| (`--.*?) \|', table, re.MULTILINE):
    documented.update(re.findall(r'`(--[a-z-]+)`', row))
  flags = {option for action in cifar10_main.build_parser()._actions
           for option in action.option_strings if option.startswith('--')}
  assert documented == flags - {'--help'}


def test_every_module_is_installed():
  modules = {os.path.basename(path)[:-3]
             for path in glob.glob(os.path.join(ROOT, '*.py'))}
  listed = re.search(r'py_modules=\[(.*?)\]', read('setup.py'), re.DOTALL)
  assert set(re.findall(r"'(\w+)'", listed.group(1))) == modules - {
      'setup', 'noxfile'}


def test_training_reaches_its_directories_through_tf_gfile_only():
  calls = re.compile(r'(?<![\w.])open\(|os\.path\.(exists|isdir|isfile)\(|'
                     r'os\.(listdir|makedirs|mkdir|remove|rename|replace)\(|'
                     r'shutil\.')
  for module in ('checks', 'cifar10', 'cifar10_main', 'cifar10_utils',
                 'cluster', 'local_cluster', 'model_fn', 'stop_signals',
                 'summaries', 'tf_config', 'training'):
    found = calls.findall(read(module + '.py'))
    assert not found, module


def test_files_stay_short_enough_to_read():
  for path in (glob.glob(os.path.join(ROOT, '*.py')) +
               glob.glob(os.path.join(ROOT, '*', '*.py'))):
    assert len(read(path).splitlines()) < 500, path
