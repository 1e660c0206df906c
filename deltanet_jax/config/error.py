"""The error of wrong user input."""


class ConfigError(ValueError):
  """The user's input is wrong; the message is one line that says what to
  change."""
