"""Errors a user can mend: one line on standard error, exit status 2."""
import argparse
import sys


class UsageError(ValueError):
  """Names the flag or file, its value, and what is allowed; one line."""


class ArgumentParser(argparse.ArgumentParser):
  """An ArgumentParser whose errors are one line, without the usage text."""

  def error(self, message):
    line = ' '.join(str(message).split())
    self.exit(2, '%s: error: %s\n' % (self.prog, line))


def run(parser, main, argv=None):
  """Calls main(**flags) and turns its UsageError into one line, status 2."""
  args = parser.parse_args(argv)
  try:
    main(**vars(args))
  except UsageError as e:
    parser.error(e)
  except KeyboardInterrupt:
    sys.exit(130)


def boolean(text):
  """argparse type: True or False, yes or no, 1 or 0."""
  values = {'true': True, 'yes': True, '1': True,
            'false': False, 'no': False, '0': False}
  if text.lower() not in values:
    raise argparse.ArgumentTypeError('%r is not True or False' % text)
  return values[text.lower()]


def step_range(text):
  """argparse type: 'A:B' to (A, B), the steps from A to before B."""
  try:
    first, last = [int(part) for part in text.split(':')]
  except ValueError:
    first = last = 0
  if not 0 <= first < last:
    raise argparse.ArgumentTypeError('%r is not A:B with 0 <= A < B' % text)
  return first, last


def comma_separated(number):
  """argparse type: 'a,b,c' to a list of `number`s, '' to an empty list."""
  def parse(text):
    try:
      return [number(item) for item in text.split(',') if item]
    except ValueError:
      raise argparse.ArgumentTypeError(
          '%r is not a comma-separated list of numbers' % text)
  return parse
